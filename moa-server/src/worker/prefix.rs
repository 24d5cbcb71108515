//! Sequences of ended prompts and turns, for requests that begin alike.

use std::collections::VecDeque;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use moa_models::{Decoder, Math, OffloadedSequence, Result, Sequence};

/// Fewest tokens that are worth keeping, and worth a copy.
const FEWEST: usize = 16;
/// Prompts that are remembered beside those of kept sequences.
const REMEMBERED: usize = 64;

/// Kept sequences, of which the longest unused go where there are too many bytes: from the device to host memory, and
/// from there for good.
///
/// A ring cannot be cut, so that a sequence is of use where it is continued, or rolled back as far as its
/// rings allow. It is of use only to sequences of its own capacity, on which the spans of a plan depend.
pub(crate) struct PrefixCache<D: Math> {
    device: Tier<Sequence<D>>,
    host: Tier<OffloadedSequence>,
    /// Copies sequences to host memory, once there was one.
    copier: Option<Copier<D>>,
    /// Those that it has not copied yet, in their order.
    copied: VecDeque<Entry<usize>>,
    /// Counts uses.
    clock: u64,
    /// Prompts of late, whose sequences may be gone.
    remembered: VecDeque<(usize, Vec<u32>)>,
}

/// A thread that copies sequences to host memory, one after the other, while others run.
struct Copier<D: Math> {
    /// Dropped to end the thread.
    sequences: Option<mpsc::Sender<Sequence<D>>>,
    /// `None` for one that cannot be copied. Dropped to end the thread before all are copied.
    copies: Option<mpsc::Receiver<Option<OffloadedSequence>>>,
    thread: Option<JoinHandle<()>>,
}

impl<D: Math + 'static> Copier<D> {
    /// `None` where there is no thread to be had.
    fn new(model: Arc<Decoder<D>>) -> Option<Self> {
        let (sequences, to_copy) = mpsc::channel::<Sequence<D>>();
        let (done, copies) = mpsc::channel();
        let run = move || {
            for sequence in to_copy {
                // What cannot be copied is not worth an error.
                let copy = model.offload(&sequence).ok();
                // Whoever waits for the copy may need the memory.
                drop(sequence);
                if done.send(copy).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("moa copies".to_owned()).spawn(run).ok()?;
        Some(Self { sequences: Some(sequences), copies: Some(copies), thread: Some(thread) })
    }
}

impl<D: Math> Drop for Copier<D> {
    fn drop(&mut self) {
        self.sequences = None;
        // The thread ends with the copy in hand: nobody takes the rest.
        self.copies = None;
        if let Some(thread) = self.thread.take() {
            // If it panicked, that was told of already.
            let _ = thread.join();
        }
    }
}

/// What is kept in one memory.
struct Tier<S> {
    limit: u64,
    bytes: u64,
    entries: Vec<Entry<S>>,
}

struct Entry<S> {
    tokens: Vec<u32>,
    sequence: S,
    bytes: u64,
    used: u64,
}

/// A sequence in either memory.
trait Kept {
    fn capacity(&self) -> usize;
    fn can_truncate(&self, len: usize) -> bool;
}

impl<D: Math> Kept for Sequence<D> {
    fn capacity(&self) -> usize {
        self.capacity()
    }

    fn can_truncate(&self, len: usize) -> bool {
        self.can_truncate(len)
    }
}

impl Kept for OffloadedSequence {
    fn capacity(&self) -> usize {
        self.capacity()
    }

    fn can_truncate(&self, len: usize) -> bool {
        self.can_truncate(len)
    }
}

impl<S: Kept> Tier<S> {
    fn new(limit: u64) -> Self {
        Self { limit, bytes: 0, entries: Vec::new() }
    }

    /// The entry that has most of a prompt's first `most` tokens and how many, and how many any entry has, though it
    /// may not be cut there.
    fn find(
        &self,
        prompt: &[u32],
        most: usize,
        capacity: usize,
    ) -> (Option<(usize, usize)>, usize) {
        let (mut best, mut parted) = (None, 0);
        for (at, entry) in self.entries.iter().enumerate() {
            if entry.sequence.capacity() != capacity {
                continue;
            }
            let common = common(&entry.tokens, prompt).min(most);
            parted = parted.max(common);
            let better = best.is_none_or(|(_, len)| common > len);
            if common >= FEWEST && better && entry.sequence.can_truncate(common) {
                best = Some((at, common));
            }
        }
        (best, parted)
    }

    fn has(&self, tokens: &[u32], capacity: usize) -> bool {
        let is_same = |e: &Entry<S>| e.sequence.capacity() == capacity && e.tokens == tokens;
        self.entries.iter().any(is_same)
    }

    /// Takes out the longest unused until so many bytes are free.
    fn make_room(&mut self, bytes: u64) -> Vec<Entry<S>> {
        let mut gone = Vec::new();
        while self.bytes + bytes > self.limit {
            let oldest = self.entries.iter().enumerate().min_by_key(|(_, entry)| entry.used);
            let Some((at, _)) = oldest else { break };
            let entry = self.entries.swap_remove(at);
            self.bytes -= entry.bytes;
            gone.push(entry);
        }
        gone
    }

    fn push(&mut self, entry: Entry<S>) {
        self.bytes += entry.bytes;
        self.entries.push(entry);
    }
}

/// What is known of the beginning of a prompt.
pub(crate) struct Beginning<D: Math> {
    /// A sequence that holds its first tokens.
    pub(crate) sequence: Option<Sequence<D>>,
    /// Where another prompt parted from it, if that is further: a good place for a copy.
    pub(crate) fork: Option<usize>,
}

impl<D: Math + 'static> PrefixCache<D> {
    /// One that keeps so many bytes on the device, and so many in host memory.
    pub(crate) fn new(device: u64, host: u64) -> Self {
        Self {
            device: Tier::new(device),
            host: Tier::new(host),
            copier: None,
            copied: VecDeque::new(),
            clock: 0,
            remembered: VecDeque::new(),
        }
    }

    /// Bytes of keys and values on the device.
    pub(crate) fn bytes(&self) -> u64 {
        self.device.bytes
    }

    /// Bytes of keys and values in host memory.
    pub(crate) fn host_bytes(&self) -> u64 {
        self.host.bytes
    }

    /// Whether a sequence of so many tokens and bytes would be kept.
    pub(crate) fn takes(&self, tokens: usize, bytes: u64) -> bool {
        tokens >= FEWEST && bytes <= self.device.limit
    }

    /// The longest beginning of `prompt`, without its last token, that a sequence of this capacity has.
    ///
    /// # Errors
    /// As [`Decoder::fork`].
    pub(crate) fn find(
        &mut self,
        model: &Decoder<D>,
        prompt: &[u32],
        capacity: usize,
    ) -> Result<Beginning<D>> {
        // At least one token must be read to have logits.
        let most = prompt.len().saturating_sub(1);
        let (own, parted) = self.device.find(prompt, most, capacity);
        let known = own.map_or(FEWEST, |(_, len)| len);
        let is_wanted = |entry: &Entry<usize>| {
            entry.sequence == capacity && common(&entry.tokens, prompt).min(most) > known
        };
        // Waiting for a copy takes less than reading the prompt.
        let wanted = self.copied.iter().rposition(is_wanted);
        self.collect(wanted.map_or(0, |at| at + 1));
        let (offloaded, parted_host) = self.host.find(prompt, most, capacity);
        let mut parted = parted.max(parted_host);
        for (of, tokens) in &self.remembered {
            if *of == capacity {
                parted = parted.max(common(tokens, prompt).min(most));
            }
        }
        // A step ends only where a whole stretch of the prompt is left.
        let parted = parted.min(prompt.len().saturating_sub(model.device().many_rows()));
        let len = |found: Option<(usize, usize)>| found.map_or(0, |(_, len)| len);
        let (own_len, offloaded_len) = (len(own), len(offloaded));
        let found = own_len.max(offloaded_len);
        let fork = (parted >= FEWEST.max(found + FEWEST)).then_some(parted);
        self.clock += 1;
        let mut sequence = match (own, offloaded) {
            (Some((at, _)), _) if own_len >= offloaded_len => {
                self.device.entries[at].used = self.clock;
                model.fork(&self.device.entries[at].sequence)?
            }
            (_, Some((at, _))) => {
                self.host.entries[at].used = self.clock;
                model.reload(&self.host.entries[at].sequence)?
            }
            _ => return Ok(Beginning { sequence: None, fork }),
        };
        model.truncate(&mut sequence, found)?;
        Ok(Beginning { sequence: Some(sequence), fork })
    }

    /// Notes a prompt, so that the next one knows where it parts from it.
    pub(crate) fn remember(&mut self, prompt: &[u32], capacity: usize) {
        let is_same = |(of, tokens): &(usize, Vec<u32>)| *of == capacity && tokens == prompt;
        if self.device.limit > 0 && !self.remembered.iter().any(is_same) {
            self.remembered.push_back((capacity, prompt.to_vec()));
            self.remembered.drain(..self.remembered.len().saturating_sub(REMEMBERED));
        }
    }

    /// Whether a sequence of these tokens is kept.
    pub(crate) fn has(&self, tokens: &[u32], capacity: usize) -> bool {
        let is_same = |e: &Entry<usize>| e.sequence == capacity && e.tokens == tokens;
        self.device.has(tokens, capacity)
            || self.host.has(tokens, capacity)
            || self.copied.iter().any(is_same)
    }

    /// Keeps a sequence that holds these tokens.
    pub(crate) fn insert(
        &mut self,
        model: &Arc<Decoder<D>>,
        tokens: Vec<u32>,
        sequence: Sequence<D>,
        bytes: u64,
    ) {
        if !self.takes(tokens.len(), bytes) || self.has(&tokens, sequence.capacity()) {
            return;
        }
        for entry in self.device.make_room(bytes) {
            self.offload(model, entry);
        }
        self.clock += 1;
        self.device.push(Entry { tokens, sequence, bytes, used: self.clock });
    }

    /// Has what has no room on the device copied to host memory. Where copies fall behind, so that they would hold more
    /// memory of the device than what is kept there, it is dropped.
    fn offload(&mut self, model: &Arc<Decoder<D>>, entry: Entry<Sequence<D>>) {
        self.collect(0);
        let behind: u64 = self.copied.iter().map(|entry| entry.bytes).sum();
        if self.host.limit == 0 || behind + entry.bytes > self.device.limit {
            return;
        }
        if self.copier.is_none() {
            self.copier = Copier::new(Arc::clone(model));
        }
        let Entry { tokens, sequence, bytes, used } = entry;
        let capacity = sequence.capacity();
        let sequences = self.copier.as_ref().and_then(|copier| copier.sequences.as_ref());
        if sequences.is_some_and(|to| to.send(sequence).is_ok()) {
            self.copied.push_back(Entry { tokens, sequence: capacity, bytes, used });
        }
    }

    /// Takes the copies that are made, and waits for the first so many.
    pub(crate) fn collect(&mut self, mut waits: usize) {
        let copies = self.copier.as_ref().and_then(|copier| copier.copies.as_ref());
        let Some(copies) = copies else { return };
        while !self.copied.is_empty() {
            let copy = match waits {
                0 => match copies.try_recv() {
                    Err(mpsc::TryRecvError::Empty) => return,
                    Err(mpsc::TryRecvError::Disconnected) => None,
                    Ok(copy) => copy,
                },
                _ => copies.recv().ok().flatten(),
            };
            waits = waits.saturating_sub(1);
            let Some(entry) = self.copied.pop_front() else { return };
            let Some(sequence) = copy else { continue };
            let bytes = sequence.bytes();
            if bytes <= self.host.limit {
                self.host.make_room(bytes);
                self.host.push(Entry { tokens: entry.tokens, sequence, bytes, used: entry.used });
            }
        }
    }

    /// Drops all of them on the device, once those that are being copied are copied.
    pub(crate) fn clear(&mut self) {
        self.device.entries.clear();
        self.device.bytes = 0;
        self.collect(self.copied.len());
    }
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use moa_models::Cpu;

    #[test]
    fn a_prompt_is_remembered_once() {
        let mut cache = PrefixCache::<Cpu>::new(1, 0);
        for _ in 0..3 {
            cache.remember(&[1, 2, 3], 512);
        }
        cache.remember(&[1, 2, 3], 640);
        assert_eq!(cache.remembered.len(), 2);
        for token in 0..1000 {
            cache.remember(&[token], 512);
        }
        assert_eq!(cache.remembered.len(), REMEMBERED);
    }
}
