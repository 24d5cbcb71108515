//! Numbers of 8 bits: a sign, 4 bits of exponent and 3 of mantissa, up to 448, without infinities.

use crate::{Error, Result};

/// The largest number.
pub const MAX: f32 = 448.0;

/// The nearest e4m3, ties to even; what is larger than [`MAX`] becomes that, NaN stays one.
pub fn encode(x: f32) -> u8 {
    if x.is_nan() { 0x7f } else { encode_number(x) }
}

/// Without branches, so that rows are done by vectors.
#[inline(always)]
fn encode_number(x: f32) -> u8 {
    let sign = x.to_bits() >> 24 & 0x80;
    let size = f32::from_bits(x.to_bits() & 0x7fff_ffff);
    let bits = if size > MAX { MAX } else { size }.to_bits();
    let normal = (bits + 0x7_ffff + (bits >> 20 & 1)).wrapping_sub(120 << 23) >> 20;
    // Below the smallest normal number, multiples of 2^-9: the last bit of a number at 2^14.
    let subnormal = (size + 16384.0).to_bits() & 0xf;
    (sign | if size < 1.0 / 64.0 { subnormal } else { normal }) as u8
}

/// The number that a byte stands for.
pub fn decode(byte: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(byte >> 3 & 0xf), f32::from(byte & 7));
    let size = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
    };
    if byte & 0x80 == 0 { size } else { -size }
}

/// Rounds a row of a weight to `scale * e4m3` and returns the scale: the smallest power of two by
/// which none of it is larger than [`MAX`], 1 for a row of zeros.
///
/// Precision of floating-point numbers does not depend on their scale, and with a power of two every
/// result is also an f16 or bf16 (one that f16 has no number as small as is below 2^-24 times what
/// rounding costs the row's largest).
///
/// `to` is as long as `row`; of what is longer the rest stays as it is.
///
/// # Errors
/// [`Error::NotFinite`] with the place in the row.
pub fn encode_row(row: &[f32], to: &mut [u8]) -> Result<f32> {
    // By bits, as those of finite numbers are in the same order, and sorted below all others.
    let largest = row.iter().fold(0, |most, x| most.max(x.to_bits() & 0x7fff_ffff));
    if largest >= f32::INFINITY.to_bits() {
        let column = row.iter().position(|x| !x.is_finite()).unwrap_or(0);
        return Err(Error::NotFinite { row: 0, column, value: row[column] });
    }
    // 448 is 1.75 * 2^8; scales stay normal numbers.
    let power = match largest {
        0 => 0,
        bits => (bits >> 23) as i32 - 127 - 8 + i32::from(bits & 0x7f_ffff > 0x60_0000),
    };
    let power = power.max(-126);
    let inverse = 2f32.powi(-power);
    for (byte, x) in to.iter_mut().zip(row) {
        *byte = encode_number(x * inverse);
    }
    Ok(2f32.powi(power))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By the definition: of all numbers the nearest, of two as near the even one.
    fn nearest(x: f32) -> u8 {
        let codes = (0..=0xffu8).filter(|code| code & 0x7f != 0x7f);
        let sign = if x.is_sign_negative() { 0x80 } else { 0 };
        codes
            .filter(|code| code & 0x80 == sign)
            .min_by(|&a, &b| {
                let distance = |code| (f64::from(decode(code)) - f64::from(x)).abs();
                distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1)))
            })
            .unwrap()
    }

    #[test]
    fn every_number_is_itself() {
        for code in 0..=0xff {
            let x = decode(code);
            if x.is_nan() {
                assert_eq!(code & 0x7f, 0x7f);
                assert_eq!(encode(x), 0x7f);
            } else {
                assert_eq!(encode(x), code, "{x}");
            }
        }
        assert_eq!((decode(0x7e), decode(0x08), decode(0x01)), (448.0, 1.0 / 64.0, 1.0 / 512.0));
    }

    #[test]
    fn rounding_is_to_the_nearest_and_of_ties_to_the_even_one() {
        let finite: Vec<f32> = (0..0x7f).map(decode).collect();
        for pair in finite.windows(2) {
            let middle = (pair[0] + pair[1]) / 2.0;
            for x in [middle, middle.next_down(), middle.next_up(), pair[1].next_down()] {
                for x in [x, -x] {
                    assert_eq!(encode(x), nearest(x), "{x}");
                }
            }
        }
        assert_eq!(encode(-0.0), 0x80);
        assert_eq!(encode(f32::MIN_POSITIVE), 0);
    }

    #[test]
    fn what_is_too_large_is_the_largest() {
        for x in [449.0, 464.0, 1e9, f32::INFINITY] {
            assert_eq!((encode(x), encode(-x)), (0x7e, 0xfe));
        }
    }

    fn round(row: &[f32]) -> (f32, Vec<f32>) {
        let mut bytes = vec![0; row.len()];
        let scale = encode_row(row, &mut bytes).unwrap();
        (scale, bytes.iter().map(|byte| scale * decode(*byte)).collect())
    }

    #[test]
    fn rows_use_the_whole_range_and_no_more() {
        for (largest, expected) in [
            (448.0, 1.0),
            (448.0f32.next_up(), 2.0),
            (224.0, 0.5),
            (1.0, 1.0 / 256.0),
            (1.8, 1.0 / 128.0),
        ] {
            let (scale, rounded) = round(&[0.0, -largest, largest / 2.0]);
            assert_eq!(scale, expected, "{largest}");
            assert!((rounded[1] + largest).abs() <= largest / 16.0, "{rounded:?}");
        }
        for largest in [1e38, f32::MIN_POSITIVE, 1e-42] {
            let (scale, rounded) = round(&[largest, 0.0]);
            assert!(scale.is_normal() && rounded[0].is_finite() && rounded[1] == 0.0, "{largest}");
        }
        assert_eq!(round(&[0.0, -0.0]), (1.0, vec![0.0, 0.0]));
        assert_eq!(round(&[]), (1.0, vec![]));
    }

    #[test]
    fn normal_numbers_are_within_a_sixteenth() {
        let row: Vec<f32> = (1..2000u16).map(|i| f32::from(i) * 1e-5).collect();
        let (_, rounded) = round(&row);
        for (x, rounded) in row.iter().zip(rounded) {
            assert!((x - rounded).abs() <= x / 16.0, "{x} became {rounded}");
        }
    }

    #[test]
    fn what_is_no_number_is_named() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -f32::NAN] {
            let error = encode_row(&[1.0, bad, 2.0], &mut [0; 3]).unwrap_err();
            let Error::NotFinite { column: 1, value, .. } = error else { panic!("{error}") };
            assert_eq!(value.to_bits(), bad.to_bits());
        }
    }
}
