//! From f32 to blocks, as the reference implementations of the formats round: the same bytes.

use super::{BlockType, f16_to_f32};

/// Elements that share a step or its factor.
const GROUP: usize = 32;

/// Elements of the formats whose groups share their factors.
const LONG: usize = 256;

impl BlockType {
    /// Appends `values` as blocks: the bytes that the reference implementation writes without data about
    /// which values matter.
    ///
    /// Elements of one step are rounded to the step that their largest gives. The longer formats search
    /// steps and least elements of the least squares.
    ///
    /// # Panics
    /// If `values` are not whole blocks.
    pub fn narrow(self, values: &[f32], to: &mut Vec<u8>) {
        assert!(values.len().is_multiple_of(self.block_len()));
        let (short, long) = (values.as_chunks::<GROUP>().0, values.as_chunks::<LONG>().0);
        match self {
            Self::Q4_0 => short.iter().for_each(|x| symmetric::<4>(x, to)),
            Self::Q5_0 => short.iter().for_each(|x| symmetric::<5>(x, to)),
            Self::Q4_1 => short.iter().for_each(|x| from_least::<4>(x, to)),
            Self::Q5_1 => short.iter().for_each(|x| from_least::<5>(x, to)),
            Self::Q8_0 => short.iter().for_each(|x| eight(x, to)),
            Self::Q4K => long.iter().for_each(|x| grouped::<4>(x, to)),
            Self::Q5K => long.iter().for_each(|x| grouped::<5>(x, to)),
            Self::Q6K => long.iter().for_each(|x| six(x, to)),
        }
    }
}

fn inverse(x: f32) -> f32 {
    if x == 0.0 { 0.0 } else { 1.0 / x }
}

/// As the file keeps it.
fn half(x: f32, to: &mut Vec<u8>) -> f32 {
    let x = f32_to_f16(x);
    to.extend(x.to_le_bytes());
    f16_to_f32(x)
}

/// 2^-14. As bits, since Rust does not promise the precision of `powi`.
const SMALLEST_NORMAL_F16: f32 = f32::from_bits(113 << 23);

/// To the nearest, of two the even one.
pub(crate) fn f32_to_f16(x: f32) -> u16 {
    let (sign, size) = ((x.to_bits() >> 16) as u16 & 0x8000, x.abs());
    let magnitude = if size.is_nan() {
        0x7e00
    } else if size >= 65520.0 {
        0x7c00
    } else if size < SMALLEST_NORMAL_F16 {
        // Multiples of 2^-24: the sum is rounded as f32 are.
        ((size * 16_777_216.0 + 8_388_608.0).to_bits() - 8_388_608.0f32.to_bits()) as u16
    } else {
        let bits = size.to_bits();
        let odd = bits >> 13 & 1;
        (((bits + 0xfff + odd) >> 13) - (112 << 10)) as u16
    };
    sign | magnitude
}

/// The element of the largest size, the first of several.
fn largest(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |most: f32, x| if x.abs() > most.abs() { *x } else { most })
}

/// Codes of `BITS` bits: of 5, the highest bits of all stand before the others.
fn pack<const BITS: u32>(codes: [u8; GROUP], to: &mut Vec<u8>) {
    if BITS == 5 {
        let high = codes.iter().rev().fold(0u32, |bits, code| bits << 1 | u32::from(code >> 4));
        to.extend(high.to_le_bytes());
    }
    let (low, high) = codes.split_at(GROUP / 2);
    to.extend(low.iter().zip(high).map(|(low, high)| low & 15 | high << 4));
}

/// The element of the largest size gets the lowest code.
fn symmetric<const BITS: u32>(x: &[f32; GROUP], to: &mut Vec<u8>) {
    let zero = (1 << (BITS - 1)) as f32;
    let step = largest(x) / -zero;
    let inverse = inverse(step);
    half(step, to);
    let most = 2.0 * zero - 1.0;
    pack::<BITS>(x.map(|x| (x * inverse + zero + 0.5).trunc().min(most) as u8), to);
}

fn from_least<const BITS: u32>(x: &[f32; GROUP], to: &mut Vec<u8>) {
    let most = ((1 << BITS) - 1) as f32;
    let least = x.iter().copied().fold(f32::MAX, f32::min);
    let step = (x.iter().copied().fold(f32::MIN, f32::max) - least) / most;
    let inverse = inverse(step);
    half(step, to);
    half(least, to);
    pack::<BITS>(x.map(|x| ((x - least) * inverse + 0.5).trunc().min(most) as u8), to);
}

fn eight(x: &[f32; GROUP], to: &mut Vec<u8>) {
    let step = largest(x).abs() / 127.0;
    let inverse = inverse(step);
    half(step, to);
    to.extend(x.map(|x| (x * inverse).round() as i8 as u8));
}

/// Steps and least elements of 6 bits for each of 8 groups.
fn grouped<const BITS: u32>(x: &[f32; LONG], to: &mut Vec<u8>) {
    let most = (1 << BITS) - 1;
    // Where the search of the step begins, and how far it goes.
    let (first, steps) = if BITS == 4 { (-1.0, 20) } else { (-0.5, 15) };
    let mut codes = [[0u8; GROUP]; LONG / GROUP];
    let mut found = [(0.0, 0.0); LONG / GROUP];
    let groups = x.as_chunks::<GROUP>().0;
    for ((x, codes), found) in groups.iter().zip(&mut codes).zip(&mut found) {
        let mean = (x.iter().map(|x| x * x).sum::<f32>() / GROUP as f32).sqrt();
        *found = affine(x, &x.map(|x| mean + x.abs()), most, (first, steps), codes);
    }
    let most_of = |of: fn(&(f32, f32)) -> f32| found.iter().map(of).fold(0.0, f32::max);
    let (step, least) = (most_of(|found| found.0), most_of(|found| found.1));
    let of = |most: f32| if most > 0.0 { 63.0 / most } else { 0.0 };
    let (by_step, by_least) = (of(step), of(least));
    let six = |x: f32| (x.round_ties_even() as u8).min(63);
    let scales = found.map(|(step, least)| (six(by_step * step), six(by_least * least)));

    let (step, least) = (half(step / 63.0, to), half(least / 63.0, to));
    let mut packed = [0u8; 12];
    for (group, (step, least)) in scales.into_iter().enumerate() {
        if group < 4 {
            packed[group] = step;
            packed[group + 4] = least;
        } else {
            packed[group + 4] = step & 15 | (least & 15) << 4;
            packed[group - 4] |= step >> 4 << 6;
            packed[group] |= least >> 4 << 6;
        }
    }
    to.extend(packed);
    for ((x, codes), scales) in groups.iter().zip(&mut codes).zip(scales) {
        let (step, least) = (step * f32::from(scales.0), least * f32::from(scales.1));
        if step != 0.0 {
            let code = |x: f32| ((x + least) / step).round_ties_even().clamp(0.0, most as f32);
            *codes = x.map(|x| code(x) as u8);
        }
    }
    if BITS == 5 {
        let high = |i: usize| (0..8).fold(0, |bits, group| bits | codes[group][i] >> 4 << group);
        to.extend((0..GROUP).map(high));
    }
    for pair in codes.as_chunks::<2>().0 {
        to.extend(pair[0].iter().zip(pair[1]).map(|(low, high)| low & 15 | high << 4));
    }
}

/// The step and the least element, without its sign, of the least weighted squares among some steps around that
/// which spans the group, each with the best least element; and the codes.
fn affine(
    x: &[f32; GROUP],
    weights: &[f32; GROUP],
    most: i32,
    (first, steps): (f32, usize),
    codes: &mut [u8; GROUP],
) -> (f32, f32) {
    let mut least = x.iter().copied().fold(x[0], f32::min);
    let highest = x.iter().copied().fold(x[0], f32::max);
    let sum_w: f32 = weights.iter().sum();
    let sum_x = weights.iter().zip(x).fold(0.0, |sum, (w, x)| sum + w * x);
    least = least.min(0.0);
    if highest == least {
        *codes = [0; GROUP];
        return (0.0, -least);
    }
    let round = |inverse: f32, least: f32| {
        x.map(|x| (inverse * (x - least)).round_ties_even().clamp(0.0, most as f32) as u8)
    };
    let error = |codes: &[u8; GROUP], step: f32, least: f32| {
        let all = x.iter().zip(weights).zip(codes);
        all.fold(0.0, |sum, ((x, w), code)| {
            let off = step * f32::from(*code) + least - x;
            sum + w * (off * off)
        })
    };
    let inverse = most as f32 / (highest - least);
    let mut step = 1.0 / inverse;
    *codes = round(inverse, least);
    let mut best = error(codes, step, least);
    for i in 0..=steps {
        // The search goes on from what was found: the next step spans the new least element.
        let own = round((first + 0.1 * i as f32 + most as f32) / (highest - least), least);
        let (mut sum_c, mut sum_cc, mut sum_cx) = (0.0f32, 0.0f32, 0.0f32);
        for ((x, w), code) in x.iter().zip(weights).zip(own) {
            let code = f32::from(code);
            sum_c += w * code;
            sum_cc += w * code * code;
            sum_cx += w * code * x;
        }
        let determinant = sum_w * sum_cc - sum_c * sum_c;
        if determinant > 0.0 {
            let mut own_step = (sum_w * sum_cx - sum_x * sum_c) / determinant;
            let mut own_least = (sum_cc * sum_x - sum_c * sum_cx) / determinant;
            if own_least > 0.0 {
                own_least = 0.0;
                own_step = sum_cx / sum_cc;
            }
            let own_error = error(&own, own_step, own_least);
            if own_error < best {
                (best, step, least, *codes) = (own_error, own_step, own_least, own);
            }
        }
    }
    (step, -least)
}

/// Elements of a step of 8 bits.
const SIXTEEN: usize = 16;

fn six(x: &[f32; LONG], to: &mut Vec<u8>) {
    let mut codes = [[0i8; SIXTEEN]; LONG / SIXTEEN];
    let mut steps = [0.0; LONG / SIXTEEN];
    let groups = x.as_chunks::<SIXTEEN>().0;
    for ((x, codes), step) in groups.iter().zip(&mut codes).zip(&mut steps) {
        *step = scaled(x, codes);
    }
    let most = largest(&steps);
    if most.abs() < NOTHING {
        to.resize(to.len() + 210, 0);
        return;
    }
    let inverse = -128.0 / most;
    let steps = steps.map(|step| (inverse * step).round_ties_even().min(127.0) as i8);
    let factor = f32_to_f16(1.0 / inverse);
    for ((x, codes), step) in groups.iter().zip(&mut codes).zip(steps) {
        let step = f16_to_f32(factor) * f32::from(step);
        if step != 0.0 {
            *codes = x.map(|x| (x / step).round_ties_even().clamp(-32.0, 31.0) as i8 + 32);
        }
    }
    let codes: &[i8] = codes.as_flattened();
    let at = |side: usize, quarter: usize, i: usize| codes[128 * side + 32 * quarter + i] as u8;
    for side in 0..2 {
        for quarter in 0..2 {
            let low = |i| at(side, quarter, i) & 15 | at(side, quarter + 2, i) << 4;
            to.extend((0..GROUP).map(low));
        }
    }
    for side in 0..2 {
        let high =
            |i| (0..4).fold(0, |bits, quarter| bits | at(side, quarter, i) >> 4 << (2 * quarter));
        to.extend((0..GROUP).map(high));
    }
    to.extend(steps.map(|step| step as u8));
    to.extend(factor.to_le_bytes());
}

/// Elements of this size are taken for zeros.
const NOTHING: f32 = 1e-15;

/// The step of the least squares, weighted by the squares of the elements, among some around that of the
/// largest element; and the codes from 0 to 63.
fn scaled(x: &[f32; SIXTEEN], codes: &mut [i8; SIXTEEN]) -> f32 {
    let most = largest(x);
    if most.abs() < NOTHING {
        return 0.0;
    }
    let round = |inverse: f32| x.map(|x| (inverse * x).round_ties_even().clamp(-32.0, 31.0) as i8);
    let sums = |codes: &[i8; SIXTEEN]| {
        let mut sums = (0.0f32, 0.0f32);
        for (x, code) in x.iter().zip(codes) {
            let (w, code) = (x * x, f32::from(*code));
            sums.0 += w * x * code;
            sums.1 += w * code * code;
        }
        sums
    };
    let own = round(-32.0 / most);
    let (product, square) = sums(&own);
    let mut step = if square != 0.0 { product / square } else { 0.0 };
    let mut best = step * product;
    *codes = own.map(|code| code + 32);
    for i in (-9..=9).filter(|i| *i != 0) {
        let own = round(-(32.0 + 0.1 * i as f32) / most);
        let (product, square) = sums(&own);
        if square > 0.0 && product * product > best * square {
            step = product / square;
            best = step * product;
            *codes = own.map(|code| code + 32);
        }
    }
    step
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_and_all_halfway_numbers_are_rounded_to_the_nearest_even() {
        for half in 0..0x7c00u16 {
            let (x, next) = (f16_to_f32(half), f16_to_f32(half + 1));
            assert_eq!((f32_to_f16(x), f32_to_f16(-x)), (half, half | 0x8000));
            let between = if next.is_finite() { (x + next) / 2.0 } else { 65520.0 };
            assert_eq!(f32_to_f16(between), half + half % 2, "{between}");
            assert_eq!(f32_to_f16(between.next_down()), half);
            assert_eq!(f32_to_f16(between.next_up()), half + 1);
        }
        assert_eq!(f32_to_f16(f32::NEG_INFINITY), 0xfc00);
        assert!(f16_to_f32(f32_to_f16(f32::NAN)).is_nan());
    }
}
