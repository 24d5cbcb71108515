//! A sequence as bytes and back.
//!
//! ```text
//! magic (8) | version (u32) | bytes of the header (u64) | header, JSON | caches, layer by layer | FNV-1a (16 hex digits)
//! ```
//! Numbers are little-endian. The header says which model and type of cache it is, and how each layer's cache lies
//! and is filled.

use moa_core::{CacheState, CacheType, Plan};
use serde::{Deserialize, Serialize};

use crate::checkpoint::fingerprint::fingerprint;
use crate::decoder::model::Decoder;
use crate::decoder::sequence::{Sequence, can_forget};
use crate::device::Math;
use crate::{Error, Result, memory};

const MAGIC: &[u8; 8] = b"MOASEQ\r\n";
const VERSION: u32 = 1;
/// Bytes before the header, and after the caches.
const PREFIX: usize = 8 + 4 + 8;
const CHECKSUM: usize = 16;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    /// Fingerprint of the weights.
    model: String,
    /// The device's name for the type of its caches.
    cache: String,
    little_endian: bool,
    /// What the sequence holds.
    tokens: Vec<u32>,
    /// Roles and contents of a conversation, where it is one.
    messages: Vec<(String, String)>,
    /// How a conversation becomes tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    template: Option<String>,
    layers: Vec<CacheState>,
    /// Fingerprint of the mean keys that keys of 4 bits are less, and of their feedback.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key_means: Option<String>,
    /// Bytes of each layer's cache.
    bytes: Vec<u64>,
}

/// What a file of a sequence holds.
pub(crate) struct Saved<S> {
    pub(crate) sequence: S,
    pub(crate) tokens: Vec<u32>,
    pub(crate) messages: Vec<(String, String)>,
    pub(crate) template: Option<String>,
}

/// A [`Sequence`] in host memory, for the model that [offloaded](Decoder::offload) it; a model has at least one layer.
#[derive(Debug)]
pub struct OffloadedSequence {
    layers: Vec<CacheState>,
    /// Bytes of each layer's cache.
    caches: Vec<Vec<u8>>,
    /// [`Decoder::id`] of that model.
    model: u64,
}

impl OffloadedSequence {
    /// Most tokens that it may hold.
    pub fn capacity(&self) -> usize {
        self.layers[0].capacity()
    }

    /// Bytes of keys and values.
    pub fn bytes(&self) -> u64 {
        self.caches.iter().map(|cache| cache.len() as u64).sum()
    }

    /// Whether [`Decoder::truncate`] can forget all tokens after the first `len`, once it is reloaded.
    pub fn can_truncate(&self, len: usize) -> bool {
        let back = self.layers[0].len().checked_sub(len);
        back.is_some_and(|back| self.layers.iter().all(|state| can_forget(state, back)))
    }
}

pub(crate) fn wrong(
    place: impl Into<String>,
    expected: impl std::fmt::Display,
    got: impl std::fmt::Display,
) -> Error {
    let (place, expected, got) = (place.into(), expected.to_string(), got.to_string());
    Error::SavedSequence { place, expected, got }
}

impl<D: Math> Decoder<D> {
    /// A sequence that holds `tokens`, as bytes for a file ([`moa_core::write_atomic`]) or another process.
    /// [`restore_sequence`](Self::restore_sequence) makes one of them that goes on bit for bit as this one does.
    /// There are as many bytes as slots that were used, and some of text.
    ///
    /// ```no_run
    /// use moa_core::Plan;
    /// use moa_models::{Checkpoint, Cpu};
    ///
    /// let model = Checkpoint::open(Cpu::default(), "model")?.model;
    /// let plan = Plan::load("plan.json")?;
    /// let mut sequence = model.open(&plan, 4096, 0)?;
    /// let book = [1, 2, 3];
    /// model.prefill(&mut sequence, &book, 2048)?;
    /// moa_core::write_atomic("book.state".as_ref(), &model.save_sequence(&sequence, &book)?)?;
    ///
    /// let bytes = std::fs::read("book.state").expect("just written");
    /// let (mut again, tokens) = model.restore_sequence(&plan, &bytes)?;
    /// assert_eq!(tokens, book);
    /// model.prefill(&mut again, &[4, 5], 2048)?;
    /// # Ok::<(), moa_models::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Invalid`] if another model opened the sequence, an earlier step of it failed, keys of it were
    /// evicted, it holds another number of tokens, several devices share the model, or the device does not give
    /// caches back.
    pub fn save_sequence(&self, sequence: &Sequence<D>, tokens: &[u32]) -> Result<Vec<u8>> {
        self.save_with(sequence, tokens, Vec::new(), None)
    }

    pub(crate) fn save_with(
        &self,
        sequence: &Sequence<D>,
        tokens: &[u32],
        messages: Vec<(String, String)>,
        template: Option<String>,
    ) -> Result<Vec<u8>> {
        let cache = self.saved_type()?;
        if tokens.len() != sequence.len() {
            let expected = format!("the {} that the sequence holds", sequence.len());
            return Err(Error::invalid("tokens", expected, tokens.len()));
        }
        let caches = self.offload(sequence)?.caches;
        let header = Header {
            model: self.fingerprint.clone(),
            cache,
            little_endian: cfg!(target_endian = "little"),
            tokens: tokens.to_vec(),
            messages,
            template,
            layers: sequence.caches.iter().map(|cache| cache.as_ref().clone()).collect(),
            key_means: self.narrow_keys_of(sequence.caches.iter().map(|cache| cache.as_ref()))?,
            bytes: caches.iter().map(|cache| cache.len() as u64).collect(),
        };
        let header = serde_json::to_vec(&header).map_err(|e| wrong("header", "JSON", e))?;
        let len = PREFIX + header.len() + caches.iter().map(Vec::len).sum::<usize>() + CHECKSUM;
        let mut bytes: Vec<u8> = memory::room(len, "a saved sequence")?;
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&(header.len() as u64).to_le_bytes());
        bytes.extend_from_slice(&header);
        caches.iter().for_each(|cache| bytes.extend_from_slice(cache));
        let checksum = fingerprint(&bytes);
        bytes.extend_from_slice(checksum.as_bytes());
        Ok(bytes)
    }

    /// The sequence that was [saved](Self::save_sequence), and the tokens that it holds. The plan is the one that
    /// it was opened with: another one would see other keys.
    ///
    /// # Errors
    /// [`Error::SavedSequence`] with the place if the bytes are cut off or changed, or are of another version, of
    /// another model, plan or type of cache; [`Error::Core`] if the plan is for a model of other dimensions,
    /// [`Error::OutOfMemory`] or [`Error::Backend`] if the device has no room, [`Error::Invalid`] if it does not
    /// take caches or several devices share the model.
    pub fn restore_sequence(&self, plan: &Plan, bytes: &[u8]) -> Result<(Sequence<D>, Vec<u32>)> {
        let Saved { sequence, tokens, .. } = self.restore_with(plan, bytes)?;
        Ok((sequence, tokens))
    }

    pub(crate) fn restore_with(&self, plan: &Plan, bytes: &[u8]) -> Result<Saved<Sequence<D>>> {
        let cache = self.saved_type()?;
        let (header, mut data) = open(bytes)?;
        let little = cfg!(target_endian = "little");
        if header.model != self.fingerprint {
            return Err(wrong("model", &self.fingerprint, header.model));
        }
        if header.cache != cache {
            return Err(wrong("type of the cache", cache, header.cache));
        }
        if header.little_endian != little {
            return Err(wrong("little_endian", little, header.little_endian));
        }
        self.check_layers(plan, &header)?;
        let means = self.narrow_keys_of(header.layers.iter())?;
        if header.key_means != means {
            let text = |means: Option<String>| means.unwrap_or_else(|| "none".to_owned());
            return Err(wrong("key_means", text(means), text(header.key_means)));
        }
        self.check_tokens(&header.tokens)?;
        let mut caches = Vec::with_capacity(header.layers.len());
        for (layer, size) in header.bytes.into_iter().enumerate() {
            let Some((own, rest)) =
                usize::try_from(size).ok().and_then(|n| data.split_at_checked(n))
            else {
                return Err(wrong(format!("layer {layer}"), format!("{size} bytes"), data.len()));
            };
            data = rest;
            caches.push(own);
        }
        if !data.is_empty() {
            return Err(wrong("end", "no bytes after the last layer", data.len()));
        }
        let sequence = self.of_caches(&header.layers, &caches)?;
        let Header { tokens, messages, template, .. } = header;
        Ok(Saved { sequence, tokens, messages, template })
    }

    /// A copy of a sequence in host memory, where the device's own is wanted for others; it takes as many bytes as
    /// slots that were used. [`reload`](Self::reload) makes a sequence of it that goes on bit for bit as this one.
    ///
    /// # Errors
    /// [`Error::Invalid`] if another model opened the sequence, an earlier step of it failed, keys of it were
    /// evicted, several devices share the model, or the device does not give caches back; [`Error::Backend`] if it
    /// fails.
    pub fn offload(&self, sequence: &Sequence<D>) -> Result<OffloadedSequence> {
        self.check_owner(sequence)?;
        self.saved_type()?;
        if sequence.broken || sequence.evicted.is_some() {
            let expected = "one whose steps did not fail and whose keys were not evicted";
            return Err(Error::invalid("sequence", expected, "another"));
        }
        let caches = sequence.caches.iter().map(|cache| self.device.save_cache(cache));
        Ok(OffloadedSequence {
            caches: caches.collect::<Result<_>>()?,
            layers: sequence.caches.iter().map(|cache| cache.as_ref().clone()).collect(),
            model: self.id,
        })
    }

    /// Bytes that a copy of a sequence takes which is [offloaded](Self::offload).
    pub fn offloaded_bytes(&self, sequence: &Sequence<D>) -> u64 {
        let caches = sequence.caches.iter().map(|cache| cache.as_ref());
        caches.map(|state| state.written_bytes(self.slot_bytes())).sum()
    }

    /// The sequence that was [offloaded](Self::offload), on the device again.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is another model's, [`Error::OutOfMemory`] or [`Error::Backend`] if the device has no
    /// room or fails.
    pub fn reload(&self, sequence: &OffloadedSequence) -> Result<Sequence<D>> {
        if sequence.model != self.id {
            let expected = "one that this model offloaded";
            return Err(Error::invalid("sequence", expected, "another model's"));
        }
        let caches: Vec<&[u8]> = sequence.caches.iter().map(Vec::as_slice).collect();
        self.of_caches(&sequence.layers, &caches)
    }

    /// A sequence whose caches are in these states, of these bytes.
    fn of_caches(&self, layers: &[CacheState], caches: &[&[u8]]) -> Result<Sequence<D>> {
        let slots = layers
            .iter()
            .map(|state| state.layout().bytes(state.head_dim(), self.slot_bytes()))
            .sum();
        self.device.check_room("keys and values", slots)?;
        let caches = layers.iter().zip(caches);
        let caches = caches.map(|(state, own)| self.device.restore_cache(state.clone(), own));
        Ok(Sequence {
            caches: caches.collect::<Result<_>>()?,
            rope: self.rope(layers[0].capacity())?,
            model: self.id,
            broken: false,
            evicted: None,
        })
    }

    /// The device's name for what it saves.
    fn saved_type(&self) -> Result<String> {
        if self.ranks() > 1 {
            return Err(Error::invalid("model", "one that a single device has", "a part of one"));
        }
        let unable = || Error::invalid("device", "one that gives its caches back", "another");
        self.device.saved_cache_type().ok_or_else(unable)
    }

    /// Checks that the caches are those of a sequence that is opened with this plan.
    fn check_layers(&self, plan: &Plan, header: &Header) -> Result<()> {
        let (layers, sizes) = (self.layers.len(), header.bytes.len());
        if header.layers.len() != layers || sizes != layers {
            let got = format!("{} of {sizes} sizes", header.layers.len());
            return Err(wrong("layers", format!("{layers} of as many sizes"), got));
        }
        let first = &header.layers[0];
        let (capacity, extent) = (first.capacity(), first.extent());
        if header.tokens.len() != extent.len {
            return Err(wrong("tokens", extent.len, header.tokens.len()));
        }
        if let Err(error) = self.config.check_context(capacity) {
            return Err(wrong("capacity", "within the model's context", error));
        }
        let expected = self.layouts(plan, capacity, 0)?;
        for (layer, (state, expected)) in header.layers.iter().zip(&expected).enumerate() {
            let place = format!("layer {layer}");
            if (state.capacity(), state.extent()) != (capacity, extent) {
                let expected = format!("{capacity} tokens and {extent:?}");
                return Err(wrong(place, expected, format!("{state:?}")));
            }
            if state.head_dim() != self.config.head_dim {
                let expected = format!("head_dim {}", self.config.head_dim);
                return Err(wrong(place, expected, state.head_dim()));
            }
            let (heads, own) = (expected.heads(), state.layout().heads());
            if heads.len() != own.len() {
                return Err(wrong(place, format!("{} KV heads", heads.len()), own.len()));
            }
            for (head, (expected, own)) in heads.iter().zip(own).enumerate() {
                if expected.span() != own.span() {
                    let text = |span: moa_core::Span| {
                        format!("a sink of {} and a window of {}", span.sink(), span.window())
                    };
                    let place = format!("plan, {place}, KV head {head}");
                    return Err(wrong(place, text(expected.span()), text(own.span())));
                }
                if expected.cache_type() != own.cache_type() {
                    let text = |own: Option<CacheType>| match own {
                        Some(own) => own.to_string(),
                        None => "the device's cache type".to_owned(),
                    };
                    let place = format!("plan, {place}, KV head {head}");
                    return Err(wrong(place, text(expected.cache_type()), text(own.cache_type())));
                }
            }
        }
        Ok(())
    }
}

/// The header and the bytes of the caches.
fn open(bytes: &[u8]) -> Result<(Header, &[u8])> {
    let Some(after) = bytes.strip_prefix(MAGIC) else {
        return Err(wrong("beginning", "that of a saved sequence", "another, or cut off"));
    };
    let cut = |place: &str| wrong(place, "in the file", "cut off");
    let (version, after) = after.split_first_chunk::<4>().ok_or_else(|| cut("version"))?;
    let version = u32::from_le_bytes(*version);
    if version != VERSION {
        return Err(wrong("version", VERSION, version));
    }
    let (size, after) = after.split_first_chunk::<8>().ok_or_else(|| cut("header"))?;
    let size = usize::try_from(u64::from_le_bytes(*size)).map_err(|_| cut("header"))?;
    let (header, after) = after.split_at_checked(size).ok_or_else(|| cut("header"))?;
    let data = after.len().checked_sub(CHECKSUM).ok_or_else(|| cut("checksum"))?;
    let (data, checksum) = after.split_at(data);
    let whole = fingerprint(&bytes[..bytes.len() - CHECKSUM]);
    if whole.as_bytes() != checksum {
        let got = String::from_utf8_lossy(checksum);
        return Err(wrong("checksum", format!("{whole}, of these bytes"), got));
    }
    let header = serde_json::from_slice(header).map_err(|error| wrong("header", "valid", error))?;
    Ok((header, data))
}
