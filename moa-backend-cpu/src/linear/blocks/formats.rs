//! How blocks are laid out: one type for each of them.
//!
//! Every format has codes of at most 8 bits in groups of 32, and an element is
//! `step * (code - OFFSET) + least`, rounded as the reference implementation rounds it.

use super::vector::Vector;

/// Elements of a group, which have one step, or one for each half.
pub(super) const GROUP: usize = 32;

/// Groups of the longest block.
pub(super) const MOST_GROUPS: usize = 8;

/// Steps of the two halves of each group, and the least elements.
#[derive(Clone, Copy)]
pub(super) struct Scales {
    pub(super) steps: [[f32; 2]; MOST_GROUPS],
    pub(super) least: [f32; MOST_GROUPS],
}

impl Scales {
    const NONE: Self = Self { steps: [[0.0; 2]; MOST_GROUPS], least: [0.0; MOST_GROUPS] };

    /// Of a block of one group.
    #[inline(always)]
    fn one(step: f32, least: f32) -> Self {
        let mut scales = Self::NONE;
        scales.steps[0] = [step; 2];
        scales.least[0] = least;
        scales
    }
}

/// # Safety of all functions
/// `block` must point to a whole block, on the machine that `V` stands for.
pub(super) trait Format: Copy + Send + Sync + 'static {
    /// Groups of a block. One of a single group begins with its step and, where it has one, its least element, in f16.
    const GROUPS: usize;
    /// Bytes of a block.
    const BYTES: usize;
    /// The code of 0, where a group has no least element.
    const OFFSET: i32 = 0;
    /// The two halves of a group have different steps.
    const HALVES: bool = false;
    /// Codes may be above 127.
    const WIDE: bool = false;

    /// A group has a least element, and no offset.
    const LEAST: bool = Self::OFFSET == 0;
    /// Elements of a block.
    const LEN: usize = Self::GROUPS * GROUP;

    unsafe fn scales<V: Vector>(block: *const u8) -> Scales;
    unsafe fn codes<V: Vector>(block: *const u8, group: usize) -> V::Bytes;
}

#[inline(always)]
unsafe fn half<V: Vector>(from: *const u8) -> f32 {
    // SAFETY: promised by the caller.
    unsafe { V::half(u16::from_le_bytes(from.cast::<[u8; 2]>().read())) }
}

#[inline(always)]
unsafe fn word(from: *const u8) -> u32 {
    // SAFETY: promised by the caller.
    u32::from_le_bytes(unsafe { from.cast::<[u8; 4]>().read() })
}

/// A step, 16 bytes of two codes each.
#[derive(Clone, Copy)]
pub(super) struct Q4_0;

impl Format for Q4_0 {
    const GROUPS: usize = 1;
    const BYTES: usize = 18;
    const OFFSET: i32 = 8;

    #[inline(always)]
    unsafe fn scales<V: Vector>(block: *const u8) -> Scales {
        unsafe { Scales::one(half::<V>(block), 0.0) }
    }

    #[inline(always)]
    unsafe fn codes<V: Vector>(block: *const u8, _group: usize) -> V::Bytes {
        unsafe { V::nibbles(block.add(2)) }
    }
}

/// A step, the least element, 16 bytes of two codes each.
#[derive(Clone, Copy)]
pub(super) struct Q4_1;

impl Format for Q4_1 {
    const GROUPS: usize = 1;
    const BYTES: usize = 20;

    #[inline(always)]
    unsafe fn scales<V: Vector>(block: *const u8) -> Scales {
        unsafe { Scales::one(half::<V>(block), half::<V>(block.add(2))) }
    }

    #[inline(always)]
    unsafe fn codes<V: Vector>(block: *const u8, _group: usize) -> V::Bytes {
        unsafe { V::nibbles(block.add(4)) }
    }
}

/// A step, the highest bit of each code, 16 bytes of the others.
#[derive(Clone, Copy)]
pub(super) struct Q5_0;

impl Format for Q5_0 {
    const GROUPS: usize = 1;
    const BYTES: usize = 22;
    const OFFSET: i32 = 16;

    #[inline(always)]
    unsafe fn scales<V: Vector>(block: *const u8) -> Scales {
        unsafe { Scales::one(half::<V>(block), 0.0) }
    }

    #[inline(always)]
    unsafe fn codes<V: Vector>(block: *const u8, _group: usize) -> V::Bytes {
        unsafe { V::or(V::nibbles(block.add(6)), V::sixteens(word(block.add(2)))) }
    }
}

/// A step, the least element, the highest bit of each code, 16 bytes of the others.
#[derive(Clone, Copy)]
pub(super) struct Q5_1;

impl Format for Q5_1 {
    const GROUPS: usize = 1;
    const BYTES: usize = 24;

    #[inline(always)]
    unsafe fn scales<V: Vector>(block: *const u8) -> Scales {
        unsafe { Scales::one(half::<V>(block), half::<V>(block.add(2))) }
    }

    #[inline(always)]
    unsafe fn codes<V: Vector>(block: *const u8, _group: usize) -> V::Bytes {
        unsafe { V::or(V::nibbles(block.add(8)), V::sixteens(word(block.add(4)))) }
    }
}

/// A step, 32 signed codes.
#[derive(Clone, Copy)]
pub(super) struct Q8_0;

impl Format for Q8_0 {
    const GROUPS: usize = 1;
    const BYTES: usize = 34;
    const OFFSET: i32 = 128;
    const WIDE: bool = true;

    #[inline(always)]
    unsafe fn scales<V: Vector>(block: *const u8) -> Scales {
        unsafe { Scales::one(half::<V>(block), 0.0) }
    }

    #[inline(always)]
    unsafe fn codes<V: Vector>(block: *const u8, _group: usize) -> V::Bytes {
        unsafe { V::flip(V::bytes(block.add(2))) }
    }
}

/// Steps and least elements of 8 groups, 6 bits each, and a factor for both.
///
/// # Safety
/// 16 bytes must be valid.
#[inline(always)]
unsafe fn six_bits<V: Vector>(block: *const u8) -> Scales {
    unsafe {
        let (step, least) = (half::<V>(block), half::<V>(block.add(2)));
        // Four numbers in each word. Those of the last four groups have their two highest bits where the
        // first eight numbers, of 6 bits, have two left.
        let [a, b, c] = [word(block.add(4)), word(block.add(8)), word(block.add(12))];
        let steps = [a & 0x3f3f_3f3f, c & 0x0f0f_0f0f | (a >> 6 & 0x0303_0303) << 4];
        let leasts = [b & 0x3f3f_3f3f, c >> 4 & 0x0f0f_0f0f | (b >> 6 & 0x0303_0303) << 4];
        let mut scales = Scales::NONE;
        for group in 0..MOST_GROUPS {
            let of = |words: [u32; 2]| f32::from(words[group / 4].to_le_bytes()[group % 4]);
            scales.steps[group] = [step * of(steps); 2];
            scales.least[group] = -(least * of(leasts));
        }
        scales
    }
}

/// Steps and least elements of 8 groups, 128 bytes of two codes each.
#[derive(Clone, Copy)]
pub(super) struct Q4K;

impl Format for Q4K {
    const GROUPS: usize = 8;
    const BYTES: usize = 144;

    #[inline(always)]
    unsafe fn scales<V: Vector>(block: *const u8) -> Scales {
        unsafe { six_bits::<V>(block) }
    }

    #[inline(always)]
    unsafe fn codes<V: Vector>(block: *const u8, group: usize) -> V::Bytes {
        unsafe {
            let codes = V::bytes(block.add(16 + group / 2 * 32));
            V::field(codes, 4 * (group as u32 % 2), 15)
        }
    }
}

/// Steps and least elements of 8 groups, the highest bit of each code, 128 bytes of two codes' others.
#[derive(Clone, Copy)]
pub(super) struct Q5K;

impl Format for Q5K {
    const GROUPS: usize = 8;
    const BYTES: usize = 176;

    #[inline(always)]
    unsafe fn scales<V: Vector>(block: *const u8) -> Scales {
        unsafe { six_bits::<V>(block) }
    }

    #[inline(always)]
    unsafe fn codes<V: Vector>(block: *const u8, group: usize) -> V::Bytes {
        unsafe {
            let high = V::up4(V::field(V::bytes(block.add(16)), group as u32, 1));
            let low = V::bytes(block.add(48 + group / 2 * 32));
            V::or(V::field(low, 4 * (group as u32 % 2), 15), high)
        }
    }
}

/// 128 bytes of two codes' low halves, 64 of four codes' high bits, a step for 16 elements, a factor for all
/// steps.
#[derive(Clone, Copy)]
pub(super) struct Q6K;

impl Format for Q6K {
    const GROUPS: usize = 8;
    const BYTES: usize = 210;
    const OFFSET: i32 = 32;
    const HALVES: bool = true;

    #[inline(always)]
    unsafe fn scales<V: Vector>(block: *const u8) -> Scales {
        unsafe {
            let step = half::<V>(block.add(208));
            let steps = block.add(192).cast::<[[i8; 2]; 8]>().read();
            let mut scales = Scales::NONE;
            for (to, steps) in scales.steps.iter_mut().zip(steps) {
                *to = steps.map(|own| step * f32::from(own));
            }
            scales
        }
    }

    #[inline(always)]
    unsafe fn codes<V: Vector>(block: *const u8, group: usize) -> V::Bytes {
        unsafe {
            // Each half of the block has 64 bytes of low bits and 32 of high bits.
            let (side, quarter) = (group / 4, group % 4);
            let low = V::bytes(block.add(64 * side + 32 * (quarter % 2)));
            let high = V::bytes(block.add(128 + 32 * side));
            let low = V::field(low, 4 * (quarter as u32 / 2), 15);
            V::or(low, V::up4(V::field(high, 2 * quarter as u32, 3)))
        }
    }
}
