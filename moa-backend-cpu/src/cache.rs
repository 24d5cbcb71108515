use std::sync::Arc;

use half::{bf16, f16};
use moa_core::{CacheState, Dtype, LayerLayout};

use crate::element::Element;
use crate::zeroed::zeroed;
use crate::{Error, Result};

/// Keys and values of one sequence in one layer, laid out as its [`LayerLayout`] says.
///
/// Memory comes from the system in zeroed pages: what was never written is not resident.
#[derive(Debug)]
pub struct Cache {
    pub(crate) state: CacheState,
    pub(crate) store: Store,
}

/// The two buffers, `[slots, head_dim]` each.
#[derive(Debug)]
pub(crate) struct Pair<E> {
    pub(crate) keys: Vec<E>,
    pub(crate) values: Vec<E>,
    /// The running call's new keys and values, `[kv_heads, tokens, head_dim]`; no part of the state.
    pub(crate) staged_keys: Vec<E>,
    pub(crate) staged_values: Vec<E>,
}

#[derive(Debug)]
pub(crate) enum Store {
    F32(Pair<f32>),
    F16(Pair<f16>),
    Bf16(Pair<bf16>),
}

/// Runs `$body` with `$pair` bound to the buffers, whatever their element type.
macro_rules! with_store {
    ($store:expr, $pair:ident => $body:expr) => {
        match $store {
            $crate::cache::Store::F32($pair) => $body,
            $crate::cache::Store::F16($pair) => $body,
            $crate::cache::Store::Bf16($pair) => $body,
        }
    };
}
pub(crate) use with_store;

impl Store {
    fn new(dtype: Dtype, elements: usize) -> Result<Self> {
        fn pair<E: Element>(elements: usize) -> Result<Pair<E>> {
            Ok(Pair {
                keys: zeroed(elements, "cached keys")?,
                values: zeroed(elements, "cached values")?,
                staged_keys: Vec::new(),
                staged_values: Vec::new(),
            })
        }
        Ok(match dtype {
            Dtype::F32 => Self::F32(pair(elements)?),
            Dtype::F16 => Self::F16(pair(elements)?),
            Dtype::Bf16 => Self::Bf16(pair(elements)?),
            other => {
                return Err(Error::argument("open", "cache dtype", "f32, f16 or bf16", other));
            }
        })
    }

    pub(crate) fn dtype(&self) -> Dtype {
        match self {
            Self::F32(_) => Dtype::F32,
            Self::F16(_) => Dtype::F16,
            Self::Bf16(_) => Dtype::Bf16,
        }
    }
}

impl AsRef<CacheState> for Cache {
    fn as_ref(&self) -> &CacheState {
        &self.state
    }
}

impl Cache {
    pub(crate) fn new(layout: Arc<LayerLayout>, head_dim: usize, dtype: Dtype) -> Result<Self> {
        let elements = layout
            .slots()
            .checked_mul(head_dim)
            .ok_or(Error::OutOfMemory { what: "cached keys", bytes: u64::MAX })?;
        let store = Store::new(dtype, elements)?;
        Ok(Self { state: CacheState::new(layout, head_dim), store })
    }

    /// Element type of keys and values.
    pub fn dtype(&self) -> Dtype {
        self.store.dtype()
    }

    /// Forgets all tokens and keeps the memory.
    pub fn reset(&mut self) {
        self.state.reset();
    }

    /// Bytes of the two buffers. A call's new tokens need a copy of their own while it runs.
    pub(crate) fn bytes(&self) -> u64 {
        with_store!(&self.store, pair => (size_of_val(&pair.keys[..]) + size_of_val(&pair.values[..])) as u64)
    }

    /// Makes every slot resident and pretends that `tokens` tokens were appended.
    pub(crate) fn fill_for_timing(&mut self, tokens: usize) -> Result<()> {
        fn touch<E: Element>(pair: &mut Pair<E>) {
            // Written through a value the compiler cannot see through, so that pages are mapped.
            pair.keys.fill(std::hint::black_box(E::zeroed()));
            pair.values.fill(std::hint::black_box(E::zeroed()));
        }
        with_store!(&mut self.store, pair => touch(pair));
        Ok(self.state.append(tokens)?)
    }

    /// An independent copy. Only slots that were written since the cache was empty are touched, so that
    /// a copy is not more resident than its original.
    pub(crate) fn fork(&self) -> Result<Self> {
        fn copy<E: Element>(
            from: &Pair<E>,
            to: &mut Pair<E>,
            slots: std::ops::Range<usize>,
            dim: usize,
        ) {
            let range = slots.start * dim..slots.end * dim;
            to.keys[range.clone()].copy_from_slice(&from.keys[range.clone()]);
            to.values[range.clone()].copy_from_slice(&from.values[range]);
        }
        let (layout, head_dim) = (self.state.layout(), self.state.head_dim());
        let mut fork = Self::new(Arc::clone(layout), head_dim, self.dtype())?;
        for head in layout.heads() {
            let first = head.offset().0;
            let slots = first..first + head.slots().min(self.state.extent().high_water);
            match (&self.store, &mut fork.store) {
                (Store::F32(from), Store::F32(to)) => copy(from, to, slots, head_dim),
                (Store::F16(from), Store::F16(to)) => copy(from, to, slots, head_dim),
                (Store::Bf16(from), Store::Bf16(to)) => copy(from, to, slots, head_dim),
                _ => unreachable!("a fork has its original's element type"),
            }
        }
        fork.state = self.state.clone();
        Ok(fork)
    }
}
