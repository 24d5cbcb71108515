use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use moa_core::{CacheState, CacheType, HeadLayout, LayerLayout};

use crate::element::{Fp8, Int4, Int8, RowElement};
use crate::zeroed::{refill, zeroed};
use crate::{Error, Result};

/// Keys and values of one sequence in one layer, laid out as its [`LayerLayout`] says.
///
/// Memory comes from the system in zeroed pages: what was never written is not resident.
#[derive(Debug)]
pub struct Cache {
    pub(crate) state: CacheState,
    /// One for each KV head.
    pub(crate) heads: Vec<Store>,
}

/// One head's keys, or its values.
#[derive(Debug)]
pub(crate) struct Rows<E> {
    /// `[slots, row]`.
    pub(crate) cached: Stretch<E>,
    /// The running call's new rows, `[tokens, row]`; no part of the state.
    pub(crate) staged: Stretch<E>,
}

/// Rows one after the other, and their scales where the type has any.
#[derive(Debug)]
pub(crate) struct Stretch<E> {
    pub(crate) codes: Vec<E>,
    pub(crate) scales: Vec<u16>,
}

/// Scales of so many rows of a type.
fn scales<E: RowElement>(rows: usize) -> usize {
    if E::TYPE.is_narrow() { rows } else { 0 }
}

impl<E: RowElement> Rows<E> {
    fn new(slots: usize, dim: usize, what: &'static str) -> Result<Self> {
        let codes =
            slots.checked_mul(E::units(dim)).ok_or(Error::OutOfMemory { what, bytes: u64::MAX })?;
        let cached =
            Stretch { codes: zeroed(codes, what)?, scales: zeroed(scales::<E>(slots), what)? };
        Ok(Self { cached, staged: Stretch { codes: Vec::new(), scales: Vec::new() } })
    }

    fn bytes(&self) -> u64 {
        let Stretch { codes, scales } = &self.cached;
        (size_of_val(&codes[..]) + size_of_val(&scales[..])) as u64
    }

    /// Room for so many staged rows.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; what is cached stays.
    pub(crate) fn stage(&mut self, tokens: usize, dim: usize) -> Result<&mut Stretch<E>> {
        const WHAT: &str = "new keys and values";
        refill(&mut self.staged.codes, tokens * E::units(dim), WHAT)?;
        refill(&mut self.staged.scales, scales::<E>(tokens), WHAT)?;
        Ok(&mut self.staged)
    }

    /// Copies staged rows, from this token on, to slots.
    pub(crate) fn commit(&mut self, token: usize, slots: Range<usize>, dim: usize) {
        let tokens = token..token + slots.len();
        self.cached.copy(slots, &self.staged, tokens, dim);
    }

    /// Gives back the memory of staged rows if it is more than this.
    pub(crate) fn release(&mut self, kept_bytes: usize) {
        if size_of_val(&self.staged.codes[..]) > kept_bytes {
            self.staged = Stretch { codes: Vec::new(), scales: Vec::new() };
        }
    }
}

impl<E: RowElement> Stretch<E> {
    fn copy(&mut self, to: Range<usize>, from: &Self, rows: Range<usize>, dim: usize) {
        let units = |rows: &Range<usize>| rows.start * E::units(dim)..rows.end * E::units(dim);
        self.codes[units(&to)].copy_from_slice(&from.codes[units(&rows)]);
        if E::TYPE.is_narrow() {
            self.scales[to].copy_from_slice(&from.scales[rows]);
        }
    }
}

/// One head's keys and values.
#[derive(Debug)]
pub(crate) struct Pair<K, V> {
    pub(crate) keys: Rows<K>,
    pub(crate) values: Rows<V>,
}

impl<K: RowElement, V: RowElement> Pair<K, V> {
    fn new(slots: usize, dim: usize) -> Result<Self> {
        let (keys, values) =
            (Rows::new(slots, dim, "cached keys")?, Rows::new(slots, dim, "cached values")?);
        Ok(Self { keys, values })
    }
}

#[derive(Debug)]
pub(crate) enum Store {
    F32(Pair<f32, f32>),
    F16(Pair<f16, f16>),
    Bf16(Pair<bf16, bf16>),
    Int8(Pair<Int8, Int8>),
    Fp8(Pair<Fp8, Fp8>),
    K8V4(Pair<Int8, Int4>),
    Int4(Pair<Int4, Int4>),
}

/// Runs `$body` with `$pair` bound to one head's buffers, whatever their types.
macro_rules! with_store {
    ($store:expr, $pair:ident => $body:expr) => {
        match $store {
            $crate::cache::Store::F32($pair) => $body,
            $crate::cache::Store::F16($pair) => $body,
            $crate::cache::Store::Bf16($pair) => $body,
            $crate::cache::Store::Int8($pair) => $body,
            $crate::cache::Store::Fp8($pair) => $body,
            $crate::cache::Store::K8V4($pair) => $body,
            $crate::cache::Store::Int4($pair) => $body,
        }
    };
}
pub(crate) use with_store;

impl Store {
    fn new(cache_type: CacheType, slots: usize, dim: usize) -> Result<Self> {
        Ok(match cache_type {
            CacheType::F32 => Self::F32(Pair::new(slots, dim)?),
            CacheType::F16 => Self::F16(Pair::new(slots, dim)?),
            CacheType::Bf16 => Self::Bf16(Pair::new(slots, dim)?),
            CacheType::Int8 => Self::Int8(Pair::new(slots, dim)?),
            CacheType::Fp8 => Self::Fp8(Pair::new(slots, dim)?),
            CacheType::K8V4 => Self::K8V4(Pair::new(slots, dim)?),
            CacheType::Int4 => Self::Int4(Pair::new(slots, dim)?),
            cache_type => {
                return Err(
                    moa_core::Error::CacheType { backend: "cpu", cache_type, head: None }.into()
                );
            }
        })
    }

    /// An independent copy whose first slots hold what these do.
    fn fork(&self, slots: usize, held: usize, dim: usize) -> Result<Self> {
        fn copy<K: RowElement, V: RowElement>(
            from: &Pair<K, V>,
            slots: usize,
            held: usize,
            dim: usize,
        ) -> Result<Pair<K, V>> {
            let mut to = Pair::new(slots, dim)?;
            to.keys.cached.copy(0..held, &from.keys.cached, 0..held, dim);
            to.values.cached.copy(0..held, &from.values.cached, 0..held, dim);
            Ok(to)
        }
        Ok(match self {
            Self::F32(pair) => Self::F32(copy(pair, slots, held, dim)?),
            Self::F16(pair) => Self::F16(copy(pair, slots, held, dim)?),
            Self::Bf16(pair) => Self::Bf16(copy(pair, slots, held, dim)?),
            Self::Int8(pair) => Self::Int8(copy(pair, slots, held, dim)?),
            Self::Fp8(pair) => Self::Fp8(copy(pair, slots, held, dim)?),
            Self::K8V4(pair) => Self::K8V4(copy(pair, slots, held, dim)?),
            Self::Int4(pair) => Self::Int4(copy(pair, slots, held, dim)?),
        })
    }
}

impl AsRef<CacheState> for Cache {
    fn as_ref(&self) -> &CacheState {
        &self.state
    }
}

impl Cache {
    /// Heads whose type the layout does not say have `cache_type`.
    pub(crate) fn new(
        layout: Arc<LayerLayout>,
        head_dim: usize,
        cache_type: CacheType,
    ) -> Result<Self> {
        let store = |head: &HeadLayout| {
            Store::new(head.cache_type().unwrap_or(cache_type), head.slots(), head_dim)
        };
        let heads = layout.heads().iter().map(store).collect::<Result<_>>()?;
        Ok(Self { state: CacheState::new(layout, head_dim), heads })
    }

    /// Forgets all tokens and keeps the memory.
    pub fn reset(&mut self) {
        self.state.reset();
    }

    /// Bytes of all heads' buffers. A call's new tokens need a copy of their own while it runs.
    pub(crate) fn bytes(&self) -> u64 {
        let bytes =
            |head: &Store| with_store!(head, pair => pair.keys.bytes() + pair.values.bytes());
        self.heads.iter().map(bytes).sum()
    }

    /// Makes every slot resident and pretends that `tokens` tokens were appended.
    pub(crate) fn fill_for_timing(&mut self, tokens: usize) -> Result<()> {
        fn touch<E: RowElement>(rows: &mut Rows<E>) {
            // Written through a value the compiler cannot see through, so that pages are mapped.
            rows.cached.codes.fill(std::hint::black_box(E::zeroed()));
            rows.cached.scales.fill(std::hint::black_box(0));
        }
        for head in &mut self.heads {
            with_store!(head, pair => {
                touch(&mut pair.keys);
                touch(&mut pair.values);
            });
        }
        Ok(self.state.append(tokens)?)
    }

    /// An independent copy. Only slots that were written since the cache was empty are touched, so that
    /// a copy is not more resident than its original.
    pub(crate) fn fork(&self) -> Result<Self> {
        let state = self.state.clone();
        let written = state.extent().high_water;
        let heads = self.heads.iter().zip(state.layout().heads()).map(|(store, head)| {
            store.fork(head.slots(), head.slots().min(written), state.head_dim())
        });
        let heads = heads.collect::<Result<_>>()?;
        Ok(Self { state, heads })
    }
}
