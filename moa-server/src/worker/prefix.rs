//! Sequences of ended prompts and turns, for requests that begin alike.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;

use moa_models::{Decoder, Math, OffloadedSequence, Result, Sequence};

use super::copier::{Copier, Copying};

/// Fewest tokens that are worth keeping, and worth a copy.
const FEWEST: usize = 16;
/// Prompts that are remembered beside those of kept sequences.
const REMEMBERED: usize = 64;
/// The part of the bytes on the device that marks may take.
const MARKS: u64 = 4;

/// Kept sequences, of which the longest unused go where there are too many bytes: from the device to host memory, and
/// from there for good.
///
/// A ring cannot be cut, so that a sequence is of use where it is continued, or rolled back as far as its
/// rings allow. It is of use only to sequences of its own capacity, on which the spans of a plan depend.
pub(crate) struct PrefixCache<D: Math> {
    device: Tier<Sequence<D>>,
    /// Its bytes are also those of copies that are not made yet.
    host: Tier<OffloadedSequence>,
    /// Copies sequences to host memory, once there was one.
    copier: Option<Copier<D>>,
    /// Counts uses.
    clock: u64,
    /// Prompts of late, whose sequences may be gone.
    remembered: VecDeque<(usize, Vec<u32>)>,
}

/// What is kept in one memory.
struct Tier<S> {
    limit: u64,
    /// Of all entries, and what room was made for.
    bytes: u64,
    entries: Vec<Entry<S>>,
}

/// A sequence that is kept.
pub(super) struct Entry<S> {
    /// What it holds.
    tokens: Vec<u32>,
    pub(super) sequence: S,
    bytes: u64,
    /// When it was last of use.
    used: Cell<u64>,
    /// It was kept in the middle of a prompt, and nobody has gone on from there yet.
    is_mark: Cell<bool>,
}

impl<S> Entry<S> {
    /// A request goes on from it.
    fn is_of_use(&self, clock: u64) {
        self.used.set(clock);
        self.is_mark.set(false);
    }
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

impl<D: Math> Kept for Arc<Sequence<D>> {
    fn capacity(&self) -> usize {
        self.as_ref().capacity()
    }

    fn can_truncate(&self, len: usize) -> bool {
        self.as_ref().can_truncate(len)
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

    /// Takes so many bytes for an entry to come, and the longest unused entries out where they have to go for it.
    fn make_room(&mut self, bytes: u64) -> Vec<Entry<S>> {
        self.bytes += bytes;
        let mut gone = Vec::new();
        while self.bytes > self.limit {
            let Some(entry) = self.take_oldest(|_| true) else { break };
            gone.push(entry);
        }
        gone
    }

    /// Takes the longest unused of some entries out.
    fn take_oldest(&mut self, of: impl Fn(&Entry<S>) -> bool) -> Option<Entry<S>> {
        let some = self.entries.iter().enumerate().filter(|(_, entry)| of(entry));
        let (at, _) = some.min_by_key(|(_, entry)| entry.used.get())?;
        let entry = self.entries.swap_remove(at);
        self.bytes -= entry.bytes;
        Some(entry)
    }
}

/// How many of a prompt's tokens each entry begins with, none where it is of another capacity, and whether it can be cut
/// there and is worth it.
fn commons<'a, S: Kept + 'a>(
    entries: impl Iterator<Item = &'a Entry<S>>,
    prompt: &[u32],
    capacity: usize,
) -> impl Iterator<Item = (usize, bool)> {
    entries.map(move |entry| {
        if entry.sequence.capacity() != capacity {
            return (0, false);
        }
        let common = common(&entry.tokens, prompt);
        (common, common >= FEWEST && entry.sequence.can_truncate(common))
    })
}

fn has<'a, S: Kept + 'a>(
    mut entries: impl Iterator<Item = &'a Entry<S>>,
    tokens: &[u32],
    capacity: usize,
) -> bool {
    entries.any(|entry| entry.sequence.capacity() == capacity && entry.tokens == tokens)
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
            clock: 0,
            remembered: VecDeque::new(),
        }
    }

    /// Bytes of keys and values that are kept on the device, those that are being copied away left out.
    pub(crate) fn bytes(&self) -> u64 {
        self.device.bytes
    }

    /// Bytes of keys and values in host memory, those that are being copied there included.
    pub(crate) fn host_bytes(&self) -> u64 {
        self.host.bytes
    }

    /// Whether a sequence of so many tokens and bytes would be kept.
    pub(crate) fn takes(&self, tokens: usize, bytes: u64) -> bool {
        tokens >= FEWEST && bytes <= self.device.limit
    }

    /// Where a prompt is to be marked after the first `held` tokens and before its end: at `shared`, if one is given, and at
    /// multiples of `every` tokens, or of as many times that as leave room for all marks of `bytes` each.
    pub(crate) fn marks(
        &self,
        held: usize,
        len: usize,
        every: usize,
        shared: Option<usize>,
        bytes: u64,
    ) -> Vec<usize> {
        let room = usize::try_from(self.device.limit / MARKS / bytes.max(1)).unwrap_or(usize::MAX);
        let shared = shared.filter(|at| room > 0 && *at > held && (FEWEST..len).contains(at));
        let room = room - shared.iter().len();
        let multiples = |len: usize| len.checked_div(every).unwrap_or(0);
        let all = multiples(len.saturating_sub(1)).saturating_sub(multiples(held));
        let mut marks = Vec::from_iter(shared);
        if all > 0 && room > 0 {
            let step = every.saturating_mul(all.div_ceil(room));
            let first = (held / step + 1).saturating_mul(step);
            marks.extend((first..len).step_by(step));
        }
        marks
    }

    /// The longest beginning of `prompt`, without its last token, that a sequence of this capacity has.
    ///
    /// # Errors
    /// As [`Decoder::fork`], and those of [`Decoder::on_all_ranks`].
    pub(crate) fn find(
        &mut self,
        model: &Decoder<D>,
        prompt: &[u32],
        capacity: usize,
    ) -> Result<Beginning<D>> {
        // At least one token must be read to have logits.
        let beginning = &prompt[..prompt.len().saturating_sub(1)];
        // What is being copied is on the device still, so that nobody waits for a copy.
        let copying = || self.copier.iter().flat_map(Copier::entries);
        let commons: Vec<(usize, bool)> = commons(self.device.entries.iter(), beginning, capacity)
            .chain(commons(copying(), beginning, capacity))
            .chain(commons(self.host.entries.iter(), beginning, capacity))
            .collect();
        let remembered = self.remembered.iter().filter(|(of, _)| *of == capacity);
        let parted = remembered.map(|(_, tokens)| common(tokens, beginning));
        let parted = parted.chain(commons.iter().map(|own| own.0)).max().unwrap_or(0);
        // A step ends only where a whole stretch of the prompt is left.
        let parted = parted.min(prompt.len().saturating_sub(model.device().many_rows()));
        // Ranks have rings of their own, of which those of all must reach back so far.
        let can_cut = model.on_all_ranks(commons.iter().map(|own| own.1).collect())?;
        let fitting = (0..commons.len()).rev().filter(|at| can_cut[*at]);
        let best = fitting.max_by_key(|at| commons[*at].0);
        let found = best.map_or(0, |at| commons[at].0);
        let fork = (parted >= FEWEST.max(found + FEWEST)).then_some(parted);
        self.clock += 1;
        let Some(at) = best else { return Ok(Beginning { sequence: None, fork }) };
        let after = at.checked_sub(self.device.entries.len());
        let mut sequence = match (after, after.and_then(|at| copying().nth(at))) {
            (None, _) => {
                let entry = &self.device.entries[at];
                entry.is_of_use(self.clock);
                model.fork(&entry.sequence)?
            }
            (Some(_), Some(entry)) => {
                entry.is_of_use(self.clock);
                model.fork(&entry.sequence)?
            }
            (Some(after), None) => {
                let entry = &self.host.entries[after - copying().count()];
                entry.is_of_use(self.clock);
                model.reload(&entry.sequence)?
            }
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
        has(self.device.entries.iter(), tokens, capacity)
            || has(self.copier.iter().flat_map(Copier::entries), tokens, capacity)
            || has(self.host.entries.iter(), tokens, capacity)
    }

    /// Keeps a sequence that holds these tokens; as a mark in the middle of a prompt, it takes the room of other marks alone
    /// where there are many.
    pub(crate) fn insert(
        &mut self,
        model: &Arc<Decoder<D>>,
        tokens: Vec<u32>,
        sequence: Sequence<D>,
        bytes: u64,
        is_mark: bool,
    ) {
        if !self.takes(tokens.len(), bytes) || self.has(&tokens, sequence.capacity()) {
            return;
        }
        if is_mark {
            if bytes > self.device.limit / MARKS {
                return;
            }
            let marks = self.device.entries.iter().filter(|entry| entry.is_mark.get());
            let mut all = bytes + marks.map(|entry| entry.bytes).sum::<u64>();
            while all > self.device.limit / MARKS {
                let Some(entry) = self.device.take_oldest(|entry| entry.is_mark.get()) else {
                    return;
                };
                all -= entry.bytes;
                self.offload(model, entry);
            }
        }
        for entry in self.device.make_room(bytes) {
            self.offload(model, entry);
        }
        self.clock += 1;
        let (used, is_mark) = (Cell::new(self.clock), Cell::new(is_mark));
        self.device.entries.push(Entry { tokens, sequence, bytes, used, is_mark });
    }

    /// Has what has no room on the device copied to host memory, for which there is room before it is made. It is
    /// dropped where copies that fall behind would hold more memory of the device than what is kept there, or more of
    /// the host's than there may be.
    fn offload(&mut self, model: &Arc<Decoder<D>>, entry: Entry<Sequence<D>>) {
        self.collect(false);
        let host_bytes = model.offloaded_bytes(&entry.sequence);
        let behind: u64 = self.copier.iter().flat_map(Copier::entries).map(|own| own.bytes).sum();
        let kept: u64 = self.host.entries.iter().map(|own| own.bytes).sum();
        let coming = self.host.bytes - kept;
        if coming + host_bytes > self.host.limit || behind + entry.bytes > self.device.limit {
            return;
        }
        if self.copier.is_none() {
            self.copier = Copier::new(Arc::clone(model));
        }
        let Some(copier) = &mut self.copier else { return };
        let gone = self.host.make_room(host_bytes).into_iter().map(|own| own.sequence).collect();
        let Entry { tokens, sequence, bytes, used, is_mark } = entry;
        let entry = Entry { tokens, sequence: Arc::new(sequence), bytes, used, is_mark };
        if !copier.copy(Copying { entry, host_bytes }, gone) {
            self.host.bytes -= host_bytes;
            // Its thread is gone, and what it has not copied is given up. The next copy gets another.
            self.collect(true);
            self.copier = None;
        }
    }

    /// Takes the copies that are made, or where they are waited for, all.
    pub(crate) fn collect(&mut self, waits: bool) {
        while let Some((copied, copy)) = self.copier.as_mut().and_then(|one| one.take(waits)) {
            let Copying { entry: Entry { tokens, used, is_mark, .. }, host_bytes: bytes } = copied;
            match copy {
                Some(sequence) => {
                    self.host.entries.push(Entry { tokens, sequence, bytes, used, is_mark });
                }
                None => self.host.bytes -= bytes,
            }
        }
    }

    /// Drops all of them on the device, once those that are being copied are copied.
    pub(crate) fn clear(&mut self) {
        self.device.entries.clear();
        self.device.bytes = 0;
        self.collect(true);
    }
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use moa_core::{ElasticRule, Plan};
    use moa_models::{Checkpoint, Cpu, Device as _, Dtype, LogitRows};

    /// A model, and sequences of it whose rings have wrapped, each of another text.
    struct Texts {
        model: Arc<Decoder<Cpu>>,
        plan: Plan,
    }

    impl Texts {
        const CAPACITY: usize = 512;

        fn new() -> Self {
            let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../assets/moa-tiny");
            let model = Checkpoint::open(Cpu::new(Dtype::F32), folder).unwrap().model;
            let plan = Plan::uniform(model.shape(), 8, ElasticRule::fixed(48)).unwrap();
            Self { model, plan }
        }

        fn tokens(number: u32) -> Vec<u32> {
            (0..150).map(|at| 100 + 200 * number + at % 91).collect()
        }

        fn read(&self, tokens: &[u32]) -> Sequence<Cpu> {
            let mut sequence = self.model.open(&self.plan, Self::CAPACITY, 0).unwrap();
            self.model.prefill(&mut sequence, tokens, 512).unwrap();
            sequence
        }

        /// Puts the text of this number into a cache.
        fn insert(&self, cache: &mut PrefixCache<Cpu>, number: u32) {
            let sequence = self.read(&Self::tokens(number));
            let bytes = self.model.kv_bytes(&sequence);
            cache.insert(&self.model, Self::tokens(number), sequence, bytes, false);
        }

        /// Bytes of a sequence, and of its copy.
        fn bytes(&self) -> (u64, u64) {
            let sequence = self.read(&Self::tokens(0));
            let copy = self.model.offload(&sequence).unwrap();
            assert_eq!(self.model.offloaded_bytes(&sequence), copy.bytes());
            (self.model.kv_bytes(&sequence), copy.bytes())
        }
    }

    #[test]
    fn copies_take_their_room_before_they_are_made() {
        let texts = Texts::new();
        let (device, host) = texts.bytes();
        let mut cache = PrefixCache::new(device, 2 * host);
        for number in 0..8 {
            texts.insert(&mut cache, number);
            let sequences = u64::from(number).min(2);
            assert_eq!(cache.host_bytes(), sequences * host, "after {number}");
            // So that none is dropped because copies fall behind.
            cache.collect(true);
            let all = cache.host.entries.iter().map(|own| own.sequence.bytes()).sum::<u64>();
            assert_eq!(cache.host_bytes(), all, "after {number}");
        }
        assert!(cache.has(&Texts::tokens(6), Texts::CAPACITY));
        assert!(!cache.has(&Texts::tokens(4), Texts::CAPACITY));
    }

    #[test]
    fn what_is_being_copied_is_gone_on_from_without_its_copy() {
        let texts = Texts::new();
        let (device, host) = texts.bytes();
        let mut cache = PrefixCache::new(device, 8 * host);
        let (copier, _ends) = Copier::idle();
        cache.copier = Some(copier);
        texts.insert(&mut cache, 0);
        texts.insert(&mut cache, 1);
        let (model, tokens) = (&texts.model, Texts::tokens(0));
        let go_on = |cache: &mut PrefixCache<Cpu>, prompt: &[u32]| {
            cache.find(model, prompt, Texts::CAPACITY).unwrap().sequence
        };
        let mut found = go_on(&mut cache, &[&tokens[..], &[7]].concat()).expect("it is kept");
        let logits = |sequence: &mut Sequence<Cpu>| {
            let logits = model.forward(&mut [sequence], &[&[7]], LogitRows::Last).unwrap();
            model.device().values(logits).unwrap()
        };
        assert_eq!(logits(&mut found), logits(&mut texts.read(&tokens)));
        // Its rings cannot be cut there, so that no copy would be of use.
        assert!(go_on(&mut cache, &tokens[..100]).is_none());
        // Copies that fall behind do not hold more of the device than what is kept there.
        texts.insert(&mut cache, 2);
        assert!(!cache.has(&Texts::tokens(1), Texts::CAPACITY));
        assert_eq!(cache.host_bytes(), host);
    }

    #[test]
    fn a_copier_that_is_gone_is_followed_by_another() {
        let texts = Texts::new();
        let (device, host) = texts.bytes();
        let mut cache = PrefixCache::new(device, 8 * host);
        let (copier, ends) = Copier::idle();
        drop(ends);
        cache.copier = Some(copier);
        texts.insert(&mut cache, 0);
        texts.insert(&mut cache, 1);
        assert_eq!(cache.host_bytes(), 0, "it could not be copied");
        texts.insert(&mut cache, 2);
        cache.collect(true);
        assert!(cache.has(&Texts::tokens(1), Texts::CAPACITY));
        assert_eq!(cache.host_bytes(), host);
    }

    #[test]
    fn marks_take_a_quarter_of_the_bytes_and_none_of_the_others_room() {
        let texts = Texts::new();
        let (device, _) = texts.bytes();
        let mut cache = PrefixCache::new(8 * device, 0);
        assert_eq!(cache.marks(0, 500, 100, None, device / 2), [100, 200, 300, 400]);
        assert_eq!(cache.marks(0, 501, 100, None, device / 2), [200, 400], "five have no room");
        assert_eq!(cache.marks(250, 500, 100, None, device), [300, 400]);
        assert_eq!(cache.marks(299, 401, 100, None, device), [300, 400]);
        assert!(cache.marks(250, 300, 100, None, device).is_empty());
        assert!(cache.marks(0, 500, 0, None, device).is_empty());
        assert!(cache.marks(0, 500, 100, None, 3 * device).is_empty());
        // What prompts share goes first.
        assert_eq!(cache.marks(0, 500, 100, Some(130), device / 2), [130, 200, 400]);
        assert_eq!(cache.marks(0, 500, 0, Some(130), 2 * device), [130]);
        assert!(cache.marks(130, 500, 0, Some(130), device).is_empty());
        assert!(cache.marks(0, 130, 0, Some(130), device).is_empty());
        assert!(cache.marks(0, 500, 0, Some(FEWEST - 1), device).is_empty());
        assert!(cache.marks(0, 500, 0, Some(130), 3 * device).is_empty());
        texts.insert(&mut cache, 0);
        for number in 1..6 {
            let sequence = texts.read(&Texts::tokens(number));
            cache.insert(&texts.model, Texts::tokens(number), sequence, device, true);
        }
        let kept = (0..6).filter(|n| cache.has(&Texts::tokens(*n), Texts::CAPACITY));
        assert_eq!(kept.collect::<Vec<_>>(), [0, 4, 5]);
        assert_eq!(cache.bytes(), 3 * device);
    }

    #[test]
    fn a_mark_that_a_request_goes_on_from_is_kept_as_other_prompts_are() {
        let texts = Texts::new();
        let (device, _) = texts.bytes();
        let mut cache = PrefixCache::new(8 * device, 0);
        let mark = |cache: &mut PrefixCache<Cpu>, number: u32| {
            let sequence = texts.read(&Texts::tokens(number));
            cache.insert(&texts.model, Texts::tokens(number), sequence, device, true);
        };
        mark(&mut cache, 1);
        let prompt = [&Texts::tokens(1)[..], &[7]].concat();
        let found = cache.find(&texts.model, &prompt, Texts::CAPACITY).unwrap();
        assert_eq!(found.sequence.map(|own| own.len()), Some(150));
        (2..7).for_each(|number| mark(&mut cache, number));
        let kept = (1..7).filter(|n| cache.has(&Texts::tokens(*n), Texts::CAPACITY));
        assert_eq!(kept.collect::<Vec<_>>(), [1, 5, 6], "two marks have room beside it");
    }

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
