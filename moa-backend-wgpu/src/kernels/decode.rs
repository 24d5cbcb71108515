use cubecl::prelude::*;
use moa_core::{CacheType, RowType};

use super::codes::{component, elements, load_parts, scale, vector_of};
use super::keys::{Head, Keys, head, keys, position, slot, split_keys};
use super::lanes::{
    add, dot_onto, holder, number_of, round, round_turned, scatter_add, turned, word,
};
use super::scores::capped;

/// Units of a cube: few, so that many cubes hide each other's waits.
pub(crate) const DECODE_UNITS: usize = 64;

/// Keys that a unit has under way at once, a power of two.
const AHEAD: usize = 4;

/// Score of a key that is none, whose weight is 0. Finite: the difference of two of them is a number. A score that is no
/// number, of a key that is one, is no weight either.
const MASKED: f32 = -1e30;

/// Four words: the widest load that every GPU has.
pub(crate) type Words = Vector<u32, Const<4>>;
pub(crate) type Floats = Vector<f32, Const<4>>;

/// What a kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    /// Sequences of a dispatch.
    pub(crate) sequences: usize,
    /// Query heads per KV head.
    pub(crate) group: usize,
    /// Units that share a row, a power of two: enough for one load of [`Words`] each.
    pub(crate) lanes: usize,
    /// How the store holds keys and values.
    pub(crate) own: CacheType,
    /// Sums over a row's units by plane operations, in place of shared memory.
    pub(crate) planes: bool,
    /// f16 is widened by the device's own conversion.
    pub(crate) native: bool,
    /// Whether several cubes share the keys of a head and leave partial results.
    pub(crate) partial: bool,
    /// Whether scores have a softcap.
    pub(crate) has_cap: bool,
    /// Whether the length is what a recorded step brings, and queries and the new key are turned by its angles; of one sequence
    /// whose store has whole elements.
    pub(crate) recorded: bool,
    pub(crate) turned: bool,
}

impl Shape {
    /// Vectors of four elements in a load.
    const fn parts(&self) -> usize {
        load_parts(self.own.keys())
    }

    /// Whether rows are codes with scales.
    const fn is_narrow(&self) -> bool {
        self.own.keys().is_narrow()
    }

    /// Rows that a cube reads at once.
    const fn rows(&self) -> usize {
        DECODE_UNITS / self.lanes
    }

    /// Elements of the shared memory of sums.
    const fn sums(&self) -> usize {
        if self.planes { 1 } else { DECODE_UNITS * AHEAD * self.group }
    }

    /// Scores of a unit's keys.
    const fn scores(&self) -> usize {
        AHEAD * self.group
    }

    /// Whether each score's softmax is the work of one unit of its row, which tells the others: with planes, and
    /// as long as a unit's scores are all of one query head.
    const fn shared_softmax(&self) -> bool {
        self.planes && self.group.is_power_of_two() && self.group <= self.lanes
    }

    /// Bytes of shared memory.
    pub(crate) const fn shared_bytes(&self) -> usize {
        4 * self.sums() + 16 * DECODE_UNITS * self.parts() + 8 * self.rows()
    }
}

/// One sequence's store of heads of a type, in loads of keys and of values.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Held<K: Size, V: Size> {
    pub(crate) keys: Box<[Vector<u32, K>]>,
    pub(crate) values: Box<[Vector<u32, V>]>,
    pub(crate) table: Box<[u32]>,
    pub(crate) len: u32,
}

/// What a recorded step brings: a word of the token's id, one of the sequence's length, two of nothing; cosines, and as many sines,
/// of the pairs of a head's dimensions.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Brought {
    pub(crate) words: Box<[Words]>,
}

/// What all sequences of a dispatch share.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct New {
    /// Rotated where keys are.
    pub(crate) q: Box<[Floats]>,
    /// As bits; of narrow types the words of rows, and after the keys a word of scales for each row.
    pub(crate) k: Box<[Words]>,
    pub(crate) v: Box<[Words]>,
    pub(crate) out: Box<[Floats]>,
    pub(crate) stats: Box<[f32]>,
    /// The dispatch's first sequence among the tokens, and among the partial results.
    pub(crate) first_token: u32,
    pub(crate) first: u32,
    pub(crate) query_heads: u32,
    pub(crate) kv_heads: u32,
    /// Vectors of four elements of a row.
    pub(crate) vectors: u32,
    pub(crate) scale: f32,
    /// The softcap, where there is one.
    pub(crate) cap: f32,
    /// Word of `k` where scales start.
    pub(crate) scales: u32,
}

/// Attention of one new token of each sequence over its cache and itself, and the append. Cubes: splits of
/// the keys, the store's heads, sequences.
///
/// A cube reads whole rows, the units of a row next to each other, and each row's units keep a result of
/// their own; these are joined at the end. `q` and `out` are `[tokens, query_heads, vectors]`, `k` and `v`
/// alike with `kv_heads`; `stats` is the log-sum-exp of each row. Of partial results, `out` is
/// `[sequences, query_heads, splits, vectors]` without the division by the sum, and `stats` alike (maximum,
/// sum), the sum 0 where a split has no key.
///
/// The token's slot is one that its own query does not see: the append needs no order.
///
/// `brought` has an element in recorded steps, and none in others.
///
/// Products are fused with their sums by name. A kernel is compiled for each number of sequences, and where a compiler may fuse,
/// it may do so otherwise in each: of the sum of two products it rounds the first, or the second.
#[cube(launch_unchecked)]
pub(crate) fn decode<K: Size, V: Size>(
    new: &mut New,
    held: &mut Sequence<Held<K, V>>,
    brought: &Sequence<Brought>,
    #[comptime] shape: Shape,
) {
    let (key_rows, value_rows) = comptime!((shape.own.keys(), shape.own.values()));
    let group = comptime!(shape.group);
    let lanes = comptime!(shape.lanes);
    let parts = comptime!(shape.parts());
    let rows = comptime!(shape.rows());
    let mut sums = Shared::<[f32]>::new_slice(comptime!(shape.sums()));
    let mut outputs = Shared::<[Floats]>::new_slice(comptime!(DECODE_UNITS * parts));
    let mut stats = Shared::<[f32]>::new_slice(comptime!(2 * rows));
    let unit = UNIT_POS as usize;
    let lane = unit % lanes;
    let row = unit / lanes;
    let vectors = new.vectors as usize;
    let columns = vectors / parts;
    // Units beyond a row's end read its last column and count for nothing.
    let column = lane.min(columns - 1);
    let token = new.first_token + CUBE_POS_Z;
    let sequence = new.first + CUBE_POS_Z;

    let (head, len) = described(&*held, CUBE_POS_Y, shape);
    let mut len = len;
    if comptime!(shape.recorded) {
        len = brought.index(0).words[0].extract(1usize);
    }
    let kv_head = head.number;
    let keys = keys(&head, len, len + 1);
    let share = split_keys(keys.count);
    let from = CUBE_POS_X * share;
    let to = (from + share).min(keys.count);

    let mut maximum = Array::<f32>::new(group);
    let mut sum = Array::<f32>::new(group);
    let mut output = Array::<Floats>::new(comptime!(group * parts));
    let mut query = Array::<Floats>::new(comptime!(group * parts));
    #[unroll]
    for g in 0..group {
        maximum[g] = MASKED;
        sum[g] = 0.0;
        let at = (token * new.query_heads + kv_head * comptime!(group as u32) + g as u32) as usize;
        #[unroll]
        for p in 0..parts {
            output[g * parts + p] = Vector::new(0.0);
            let scale = select(lane < columns, new.scale, 0.0);
            let vector = vector_of(column, columns, p, key_rows);
            let mut own = new.q[at * vectors + vector];
            if comptime!(shape.turned) {
                let other = new.q[at * vectors + (vector + vectors / 2) % vectors];
                own = turned(own, other, vector, vectors, &brought.index(0).words);
            }
            query[g * parts + p] = own * Vector::new(scale);
        }
    }

    if from < to {
        // The last key is the new one, which is not in the cache.
        let end = to.min(keys.count - 1);
        let ring = ring(&head, &keys, from);
        let mut base = from;
        let mut own = Own { maximum: MASKED.runtime(), sum: 0.0f32.runtime() };
        while base < end {
            let mut slots = Array::<u32>::new(AHEAD);
            #[unroll]
            for a in 0..AHEAD {
                let number = (base + (a * rows + row) as u32).min(end - 1);
                slots[a] = slot_after(&head, &ring, position(&keys, number));
            }
            let mut held_k = Array::<Vector<u32, K>>::new(AHEAD);
            let mut held_v = Array::<Vector<u32, V>>::new(AHEAD);
            let mut scales = Array::<u32>::new(AHEAD);
            load(
                &*held,
                &head,
                &slots,
                columns,
                column,
                &mut held_k,
                &mut held_v,
                &mut scales,
                shape,
            );
            let mut scores = Array::<f32>::new(comptime!(shape.scores()));
            #[unroll]
            for a in 0..AHEAD {
                #[unroll]
                for g in 0..group {
                    scores[g * AHEAD + a] = 0.0;
                }
                #[unroll]
                for p in 0..parts {
                    let key = elements::<K>(held_k[a], p, key_rows, shape.native);
                    #[unroll]
                    for g in 0..group {
                        scores[g * AHEAD + a] =
                            dot_onto(scores[g * AHEAD + a], query[g * parts + p], key);
                    }
                }
                if comptime!(shape.is_narrow()) {
                    let step = scale(scales[a], false);
                    #[unroll]
                    for g in 0..group {
                        scores[g * AHEAD + a] *= step;
                    }
                }
            }
            if comptime!(shape.shared_softmax()) {
                own.softmax(&mut scores, &mut output, base + row as u32, end, lane, new.cap, shape);
            } else {
                add(
                    &mut scores,
                    &mut sums,
                    comptime!(shape.scores()),
                    lanes,
                    DECODE_UNITS,
                    shape.planes,
                );
                #[unroll]
                for g in 0..group {
                    let mut best = maximum[g];
                    #[unroll]
                    for a in 0..AHEAD {
                        let some = base + ((a * rows + row) as u32) < end;
                        let score = capped(scores[g * AHEAD + a], new.cap, shape.has_cap);
                        scores[g * AHEAD + a] = select(some, score, MASKED);
                        best = best.max(scores[g * AHEAD + a]);
                    }
                    let rescale = (maximum[g] - best).exp();
                    maximum[g] = best;
                    #[unroll]
                    for p in 0..parts {
                        output[g * parts + p] *= Vector::new(rescale);
                    }
                    let mut total = 0.0f32;
                    #[unroll]
                    for a in 0..AHEAD {
                        let score = scores[g * AHEAD + a];
                        let weight = select(score == MASKED, 0.0, (score - best).exp());
                        total += weight;
                        scores[g * AHEAD + a] = weight;
                    }
                    sum[g] = fma(sum[g], rescale, total);
                }
            }
            #[unroll]
            for a in 0..AHEAD {
                if comptime!(shape.is_narrow()) {
                    let step = scale(scales[a], true);
                    #[unroll]
                    for g in 0..group {
                        scores[g * AHEAD + a] *= step;
                    }
                }
                #[unroll]
                for p in 0..parts {
                    let value = elements::<V>(held_v[a], p, value_rows, shape.native);
                    #[unroll]
                    for g in 0..group {
                        let weight = Vector::new(scores[g * AHEAD + a]);
                        output[g * parts + p] = fma(value, weight, output[g * parts + p]);
                    }
                }
            }
            base += comptime!((AHEAD * rows) as u32);
        }
        if comptime!(shape.shared_softmax()) {
            own.tell(&mut maximum, &mut sum, lane, shape);
        }

        if to == keys.count {
            let new_row = (token * new.kv_heads + kv_head) as usize;
            let at = if comptime!(shape.is_narrow()) {
                new_row * columns + column
            } else {
                new_row * vectors + column * parts
            };
            let mut key = round::<K>(&new.k, at, key_rows);
            if comptime!(shape.turned) {
                let row = new_row * vectors;
                let angles = &brought.index(0).words;
                key = round_turned::<K>(&new.k, row, column * parts, vectors, angles, key_rows);
            }
            let value = round::<V>(&new.v, at, value_rows);
            let mut scales = 0u32.runtime();
            if comptime!(shape.is_narrow()) {
                scales = word(&new.k, new.scales as usize + new_row);
            }
            let mut scores = Array::<f32>::new(group);
            #[unroll]
            for g in 0..group {
                scores[g] = 0.0;
                #[unroll]
                for p in 0..parts {
                    let key = elements::<K>(key, p, key_rows, shape.native);
                    scores[g] = dot_onto(scores[g], query[g * parts + p], key);
                }
                if comptime!(shape.is_narrow()) {
                    scores[g] *= scale(scales, false);
                }
            }
            add(&mut scores, &mut sums, group, lanes, DECODE_UNITS, shape.planes);
            if row == 0 {
                #[unroll]
                for g in 0..group {
                    let score = capped(scores[g], new.cap, shape.has_cap);
                    let best = maximum[g].max(score);
                    let rescale = (maximum[g] - best).exp();
                    let mut weight = (score - best).exp();
                    maximum[g] = best;
                    sum[g] = fma(sum[g], rescale, weight);
                    if comptime!(shape.is_narrow()) {
                        weight *= scale(scales, true);
                    }
                    #[unroll]
                    for p in 0..parts {
                        let before = output[g * parts + p] * Vector::new(rescale);
                        let value = elements::<V>(value, p, value_rows, shape.native);
                        output[g * parts + p] = fma(value, Vector::new(weight), before);
                    }
                }
                if lane < columns {
                    let to = slot(&head, len);
                    let scale_at = (head.scales + to - head.offset) as usize;
                    let to = to as usize * columns + column;
                    store::<K, V>(held, to, key, value, scale_at, scales, lane == 0, shape);
                }
            }
        }
    }

    #[unroll]
    for g in 0..group {
        // The head before was read.
        sync_cube();
        #[unroll]
        for p in 0..parts {
            let to = vector_of(lane, lanes, p, value_rows);
            outputs[row * comptime!(lanes * parts) + to] = output[g * parts + p];
        }
        if lane == 0 {
            stats[2 * row] = maximum[g];
            stats[2 * row + 1] = sum[g];
        }
        sync_cube();
        if unit < vectors {
            let mut largest = stats[0];
            for other in 1..rows {
                largest = largest.max(stats[2 * other]);
            }
            let mut total = 0.0f32;
            let mut joined = Vector::new(0.0f32);
            // Where the row's second half starts at the units' number, in place of the loads'.
            let mut from = unit;
            if comptime!(matches!(value_rows, RowType::Int4)) {
                from = select(unit < columns, unit, lanes + unit - columns);
            }
            for other in 0..rows {
                let factor = (stats[2 * other] - largest).exp();
                total = fma(stats[2 * other + 1], factor, total);
                let held = outputs[other * comptime!(lanes * parts) + from];
                joined = fma(held, Vector::new(factor), joined);
            }
            let query_head = kv_head * comptime!(group as u32) + g as u32;
            if comptime!(shape.partial) {
                let at = ((sequence * new.query_heads + query_head) * CUBE_COUNT_X + CUBE_POS_X)
                    as usize;
                new.out[at * vectors + unit] = joined;
                if unit == 0 {
                    new.stats[2 * at] = largest;
                    new.stats[2 * at + 1] = total;
                }
            } else {
                let at = (token * new.query_heads + query_head) as usize;
                new.out[at * vectors + unit] = joined * Vector::new(1.0 / total);
                if unit == 0 {
                    new.stats[at] = largest + total.ln();
                }
            }
        }
    }
}

/// The softmax of the query head whose scores are a unit's own: its maximum, and the sum of the weights of the
/// unit's keys.
#[derive(CubeType)]
struct Own {
    maximum: f32,
    sum: f32,
}

#[cube]
impl Own {
    /// From a unit's shares of all scores to their weights, the output rescaled alike. `first` is the number of
    /// the row's first key.
    #[allow(clippy::too_many_arguments)]
    fn softmax(
        &mut self,
        scores: &mut Array<f32>,
        output: &mut Array<Floats>,
        first: u32,
        end: u32,
        lane: usize,
        cap: f32,
        #[comptime] shape: Shape,
    ) {
        let (count, lanes, parts) = comptime!((shape.scores(), shape.lanes, shape.parts()));
        let held = comptime!((count / lanes).max(1));
        scatter_add(scores, lane, count, lanes);
        let a = number_of(lane, count, lanes) % AHEAD;
        let mut top = self.maximum;
        #[unroll]
        for i in 0..held {
            let some = first + ((a + i) * comptime!(shape.rows())) as u32;
            let some = some < end;
            scores[i] = select(some, capped(scores[i], cap, shape.has_cap), MASKED);
            top = top.max(scores[i]);
        }
        #[unroll]
        for step in 0..comptime!(count.min(lanes).ilog2() - shape.group.ilog2()) {
            let other = comptime!(1u32 << (step + shape.group.ilog2()));
            top = top.max(plane_shuffle_xor(top, other));
        }
        let rescale = (self.maximum - top).exp();
        let grown = plane_any(top > self.maximum);
        self.maximum = top;
        let mut total = 0.0f32;
        #[unroll]
        for i in 0..held {
            let weight = select(scores[i] == MASKED, 0.0, (scores[i] - top).exp());
            total += weight;
            scores[i] = weight;
        }
        self.sum = fma(self.sum, rescale, total);
        let row = UNIT_POS_PLANE - lane as u32;
        if grown {
            #[unroll]
            for g in 0..shape.group {
                let unit = comptime!(holder(g * AHEAD, count, lanes) as u32);
                let rescale = Vector::new(plane_shuffle(rescale, row + unit));
                #[unroll]
                for p in 0..parts {
                    output[g * parts + p] *= rescale;
                }
            }
        }
        let mut own = Array::<f32>::new(held);
        #[unroll]
        for i in 0..held {
            own[i] = scores[i];
        }
        #[unroll]
        for number in 0..count {
            let unit = comptime!(holder(number, count, lanes) as u32);
            scores[number] = plane_shuffle(own[comptime!(number % held)], row + unit);
        }
    }

    /// Every unit learns of every query head.
    fn tell(
        &self,
        maximum: &mut Array<f32>,
        sum: &mut Array<f32>,
        lane: usize,
        #[comptime] shape: Shape,
    ) {
        let (count, lanes) = comptime!((shape.scores(), shape.lanes));
        let mut total = self.sum;
        #[unroll]
        for step in 0..comptime!(count.min(lanes).ilog2() - shape.group.ilog2()) {
            let other = comptime!(1u32 << (step + shape.group.ilog2()));
            total += plane_shuffle_xor(total, other);
        }
        let row = UNIT_POS_PLANE - lane as u32;
        #[unroll]
        for g in 0..shape.group {
            let unit = comptime!(holder(g * AHEAD, count, lanes) as u32);
            maximum[g] = plane_shuffle(self.maximum, row + unit);
            sum[g] = plane_shuffle(total, row + unit);
        }
    }
}

/// The store's head of the cube's sequence, and the sequence's length.
#[cube]
fn described<K: Size, V: Size>(
    held: &Sequence<Held<K, V>>,
    own: u32,
    #[comptime] shape: Shape,
) -> (Head, u32) {
    let first = held.index(0);
    let mut found = head(&first.table, own);
    let mut len = first.len;
    #[unroll]
    for sequence in 1..shape.sequences {
        if CUBE_POS_Z == comptime!(sequence as u32) {
            let cache = held.index(sequence);
            found = head(&cache.table, own);
            len = cache.len;
        }
    }
    (found, len)
}

/// Loads a unit's share of [`AHEAD`] rows of the cube's sequence, and their scales. Kernels cannot choose a buffer by
/// number: these branches, which all units take alike, are what a sequence adds to a kernel.
#[allow(clippy::too_many_arguments)]
#[cube]
fn load<K: Size, V: Size>(
    held: &Sequence<Held<K, V>>,
    head: &Head,
    slots: &Array<u32>,
    columns: usize,
    column: usize,
    keys: &mut Array<Vector<u32, K>>,
    values: &mut Array<Vector<u32, V>>,
    scales: &mut Array<u32>,
    #[comptime] shape: Shape,
) {
    #[unroll]
    for sequence in 0..shape.sequences {
        if comptime!(shape.sequences == 1) || CUBE_POS_Z == comptime!(sequence as u32) {
            let cache = held.index(sequence);
            #[unroll]
            for a in 0..AHEAD {
                let at = slots[a] as usize * columns + column;
                keys[a] = cache.keys[at];
                values[a] = cache.values[at];
                if comptime!(shape.is_narrow()) {
                    let at = (head.scales + slots[a] - head.offset) as usize;
                    scales[a] = component::<K>(cache.keys[at / K::value()], at % K::value());
                }
            }
        }
    }
}

/// Writes a unit's share of a row of the cube's sequence, and of one unit its scales.
// The outer `if` is the compiler's, the inner one the kernel's.
#[allow(clippy::too_many_arguments, clippy::collapsible_if)]
#[cube]
fn store<K: Size, V: Size>(
    held: &mut Sequence<Held<K, V>>,
    at: usize,
    key: Vector<u32, K>,
    value: Vector<u32, V>,
    scale_at: usize,
    scales: u32,
    first: bool,
    #[comptime] shape: Shape,
) {
    #[unroll]
    for sequence in 0..shape.sequences {
        if comptime!(shape.sequences == 1) || CUBE_POS_Z == comptime!(sequence as u32) {
            let cache = held.index_mut(sequence);
            cache.keys[at] = key;
            cache.values[at] = value;
            if comptime!(shape.is_narrow()) {
                if first {
                    // The others of the load are of the same head, whose only writer this is.
                    let mut all = cache.keys[scale_at / K::value()];
                    #[unroll]
                    for i in 0..K::value() {
                        let here = scale_at % K::value() == i;
                        all.insert(i, select(here, scales, all.extract(i)));
                    }
                    cache.keys[scale_at / K::value()] = all;
                }
            }
        }
    }
}

/// A split's first key in the ring: later ones are found without a division.
#[derive(CubeType, Clone, Copy)]
struct Ring {
    position: u32,
    slot: u32,
}

#[cube]
fn ring(head: &Head, keys: &Keys, from: u32) -> Ring {
    let first = position(keys, from);
    let position = first.max(keys.start.max(head.sink_slots));
    Ring { position, slot: (position - head.sink_slots) % head.ring.max(1) }
}

/// [`super::keys::slot`] of a key that the split sees: those beyond the sink are no more than the ring.
#[cube]
fn slot_after(head: &Head, ring: &Ring, position: u32) -> u32 {
    let mut at = ring.slot + position - ring.position;
    if at >= head.ring {
        at -= head.ring;
    }
    select(position < head.sink_slots, head.offset + position, head.offset + head.sink_slots + at)
}
