use std::ops::Range;

use crate::decoder::model::Decoder;
use crate::device::Math;
use crate::device::rope_table::RopeTable;
use crate::error::Result;

/// Rotary angles of packed tokens: those of keys, and of queries where they are scaled besides.
pub(crate) struct Rotations<D: Math> {
    pub(crate) keys: D::Rotations,
    queries: Option<D::Rotations>,
}

impl<D: Math> Rotations<D> {
    pub(crate) fn queries(&self) -> &D::Rotations {
        self.queries.as_ref().unwrap_or(&self.keys)
    }
}

impl<D: Math> Decoder<D> {
    /// Angles of packed sequences, each with the positions of its new tokens.
    pub(crate) fn rotations(
        &self,
        sequences: &[(&RopeTable, Range<usize>)],
    ) -> Result<Rotations<D>> {
        let keys = self.device.rotations(sequences)?;
        let is_scaled = |(table, own): &(&RopeTable, Range<usize>)| table.scales_queries(own.end);
        let queries = match sequences.iter().any(is_scaled) {
            true => {
                let parts = sequences.iter().flat_map(|(table, own)| table.of_queries(own.clone()));
                let parts: Vec<_> = parts.collect();
                let parts: Vec<_> = parts.iter().map(|(table, own)| (table, own.clone())).collect();
                Some(self.device.rotations(&parts)?)
            }
            false => None,
        };
        Ok(Rotations { keys, queries })
    }
}
