//! Sequences of ended prompts and turns, for requests that begin alike.

use moa_models::{Decoder, Math, Result, Sequence};

/// Fewest tokens that are worth keeping, and worth a copy.
const FEWEST: usize = 16;
/// Prompts that are remembered beside those of kept sequences.
const REMEMBERED: usize = 64;

/// Kept sequences, of which the longest unused go where there are too many bytes.
///
/// A ring cannot be cut, so that a sequence is of use where it is continued, or rolled back as far as its
/// rings allow. It is of use only to sequences of its own capacity, on which the spans of a plan depend.
pub(crate) struct PrefixCache<D: Math> {
    limit: u64,
    bytes: u64,
    /// Counts uses.
    clock: u64,
    entries: Vec<Entry<D>>,
    /// Prompts of late, whose sequences may be gone.
    remembered: std::collections::VecDeque<(usize, Vec<u32>)>,
}

struct Entry<D: Math> {
    tokens: Vec<u32>,
    sequence: Sequence<D>,
    bytes: u64,
    used: u64,
}

/// What is known of the beginning of a prompt.
pub(crate) struct Beginning<D: Math> {
    /// A sequence that holds its first tokens.
    pub(crate) sequence: Option<Sequence<D>>,
    /// Where another prompt parted from it, if that is further: a good place for a copy.
    pub(crate) fork: Option<usize>,
}

impl<D: Math> PrefixCache<D> {
    pub(crate) fn new(limit: u64) -> Self {
        let remembered = std::collections::VecDeque::new();
        Self { limit, bytes: 0, clock: 0, entries: Vec::new(), remembered }
    }

    /// Bytes of keys and values.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether a sequence of so many tokens and bytes would be kept.
    pub(crate) fn takes(&self, tokens: usize, bytes: u64) -> bool {
        tokens >= FEWEST && bytes <= self.limit
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
        for (of, tokens) in &self.remembered {
            if *of == capacity {
                parted = parted.max(common(tokens, prompt).min(most));
            }
        }
        // A step ends only where a whole stretch of the prompt is left.
        let parted = parted.min(prompt.len().saturating_sub(model.device().many_rows()));
        let found = best.map_or(0, |(_, len)| len);
        let fork = (parted >= FEWEST.max(found + FEWEST)).then_some(parted);
        let Some((at, len)) = best else { return Ok(Beginning { sequence: None, fork }) };
        self.clock += 1;
        let entry = &mut self.entries[at];
        entry.used = self.clock;
        let mut sequence = model.fork(&entry.sequence)?;
        model.truncate(&mut sequence, len)?;
        Ok(Beginning { sequence: Some(sequence), fork })
    }

    /// Notes a prompt, so that the next one knows where it parts from it.
    pub(crate) fn remember(&mut self, prompt: &[u32], capacity: usize) {
        let is_same = |(of, tokens): &(usize, Vec<u32>)| *of == capacity && tokens == prompt;
        if self.limit > 0 && !self.remembered.iter().any(is_same) {
            self.remembered.push_back((capacity, prompt.to_vec()));
            self.remembered.drain(..self.remembered.len().saturating_sub(REMEMBERED));
        }
    }

    /// Whether a sequence of these tokens is kept.
    pub(crate) fn has(&self, tokens: &[u32], capacity: usize) -> bool {
        let is_same = |e: &Entry<D>| e.sequence.capacity() == capacity && e.tokens == tokens;
        self.entries.iter().any(is_same)
    }

    /// Keeps a sequence that holds these tokens.
    pub(crate) fn insert(&mut self, tokens: Vec<u32>, sequence: Sequence<D>, bytes: u64) {
        if !self.takes(tokens.len(), bytes) || self.has(&tokens, sequence.capacity()) {
            return;
        }
        self.make_room(bytes);
        self.clock += 1;
        self.bytes += bytes;
        self.entries.push(Entry { tokens, sequence, bytes, used: self.clock });
    }

    /// Drops the longest unused until so many bytes are free.
    fn make_room(&mut self, bytes: u64) {
        while self.bytes + bytes > self.limit {
            let oldest = self.entries.iter().enumerate().min_by_key(|(_, entry)| entry.used);
            let Some((at, _)) = oldest else { return };
            self.bytes -= self.entries.swap_remove(at).bytes;
        }
    }

    /// Drops all of them.
    pub(crate) fn clear(&mut self) {
        self.entries.clear();
        self.bytes = 0;
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
        let mut cache = PrefixCache::<Cpu>::new(1);
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
