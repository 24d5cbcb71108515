//! Layouts and states in files and messages: what cannot be computed, checked when it is read.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{CacheState, Extent, LayerLayout};
use crate::{CacheType, Error, Result, Span};

/// A [`LayerLayout`] without what follows from it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LayoutFile {
    capacity: usize,
    heads: Vec<HeadFile>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct HeadFile {
    sink: usize,
    window: usize,
    /// Slots of the ring.
    ring: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cache_type: Option<CacheType>,
}

impl From<LayerLayout> for LayoutFile {
    fn from(layout: LayerLayout) -> Self {
        let head = |head: &super::HeadLayout| HeadFile {
            sink: head.span().sink(),
            window: head.span().window(),
            ring: head.ring_slots(),
            cache_type: head.cache_type(),
        };
        Self { capacity: layout.capacity(), heads: layout.heads().iter().map(head).collect() }
    }
}

impl TryFrom<LayoutFile> for LayerLayout {
    type Error = Error;

    fn try_from(file: LayoutFile) -> Result<Self> {
        let spans: Result<Vec<_>> =
            file.heads.iter().map(|head| Span::new(head.sink, head.window)).collect();
        let spans = spans?;
        let smallest = Self::new(&spans, file.capacity, 0)?;
        for (head, own) in file.heads.iter().zip(smallest.heads()) {
            let rings = own.ring_slots()..=file.capacity - own.sink_slots();
            if !rings.contains(&head.ring) {
                let expected = format!("{} to {} slots", rings.start(), rings.end());
                return Err(Error::invalid("ring", expected, head.ring));
            }
        }
        let rings = spans.into_iter().zip(file.heads.iter().map(|head| head.ring));
        let types: Vec<_> = file.heads.iter().map(|head| head.cache_type).collect();
        Self::with_rings(rings, file.capacity)?.with_cache_types(&types)
    }
}

/// A [`CacheState`] with its layout.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StateFile {
    layout: LayerLayout,
    head_dim: usize,
    extent: Extent,
}

impl From<CacheState> for StateFile {
    fn from(state: CacheState) -> Self {
        let (head_dim, extent) = (state.head_dim(), state.extent());
        Self { layout: LayerLayout::clone(state.layout()), head_dim, extent }
    }
}

impl TryFrom<StateFile> for CacheState {
    type Error = Error;

    fn try_from(file: StateFile) -> Result<Self> {
        if file.head_dim == 0 {
            return Err(Error::invalid("head_dim", "at least 1", 0));
        }
        // The way in which a cache comes to this extent, with its checks.
        let mut state = Self::new(Arc::new(file.layout), file.head_dim);
        state.append(file.extent.high_water)?;
        if file.extent.len != file.extent.high_water {
            state.truncate(file.extent.len)?;
        }
        if state.extent() != file.extent {
            let expected = format!("{:?}", state.extent());
            return Err(Error::invalid("extent", expected, format!("{:?}", file.extent)));
        }
        Ok(state)
    }
}
