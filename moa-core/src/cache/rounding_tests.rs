use super::*;
use crate::SplitMix64;

const NARROW: [RowType; 3] = [RowType::Int8, RowType::Fp8, RowType::Int4];

fn rows(dim: usize) -> Vec<Vec<f32>> {
    let mut random = SplitMix64::new(7);
    let mut row = |outlier: f32, size: f32| {
        let mut row: Vec<f32> =
            (0..dim).map(|_| (random.unit() as f32 - 0.5) * 2.0 * size).collect();
        row[dim / 3] *= outlier;
        row
    };
    let mut rows: Vec<_> = [1.0, 30.0, 1e4].iter().map(|&outlier| row(outlier, 1.0)).collect();
    rows.extend([1e-30, 1e30].map(|size| row(1.0, size)));
    rows.push(vec![1.0; dim]);
    rows.push((0..dim).map(|i| if i == 1 % dim { -3.0 } else { 0.0 }).collect());
    rows
}

#[test]
fn what_is_stored_is_within_the_bound_of_the_row() {
    for dim in [1, 5, 20, 64, 96, 128] {
        for row in rows(dim) {
            let length = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
            let largest = row.iter().fold(0.0, |most: f64, x| most.max(f64::from(x.abs())));
            for kind in NARROW.into_iter().chain(Dtype::ALL.map(RowType::Plain)) {
                if kind == RowType::Plain(Dtype::F16) && !(1e-3..6e4).contains(&largest) {
                    continue;
                }
                let bound = kind.bound(dim, length, largest);
                for (x, stored) in row.iter().zip(kind.round(&row)) {
                    let error = (f64::from(*x) - stored).abs();
                    assert!(error <= bound, "{kind:?} of {dim}: {x} {stored}, {error} > {bound}");
                }
            }
        }
    }
}

/// The specification in words, by trying every code there is.
#[test]
fn every_code_is_the_nearest_and_every_scale_the_least() {
    for kind in NARROW {
        for mut row in rows(32) {
            let mut codes = vec![0; kind.code_bytes(32)];
            let scale = kind.narrow(&mut row, &mut codes);
            let largest = row.iter().fold(0.0, |most: f32, x| most.max(x.abs()));
            assert!(widen_scale(scale) * kind.top() >= largest);
            assert!(widen_scale(scale - 1) * kind.top() < largest);
            let mut stored = [0.0; 32];
            kind.widen(&codes, scale, &mut stored);
            let levels: Vec<f64> = (0..=255u8)
                .filter(|code| kind != RowType::Int4 || *code < 16)
                .map(|code| {
                    let mut pair = [0.0; 2];
                    kind.widen(&[code, code][..kind.code_bytes(2)], scale, &mut pair);
                    f64::from(pair[0])
                })
                .filter(|level| level.is_finite())
                .collect();
            for (x, stored) in row.iter().zip(stored) {
                let error = (f64::from(*x) - f64::from(stored)).abs();
                let least = levels.iter().map(|level| (f64::from(*x) - level).abs());
                assert_eq!(error, least.fold(f64::MAX, f64::min), "{kind:?} {x} {stored}");
            }
        }
    }
}

#[test]
fn every_e4m3_comes_back_and_ties_go_to_the_even_one() {
    for code in (0..=255u8).filter(|code| code & 0x7f != 0x7f) {
        assert_eq!(e4m3(f64::from(e4m3_to_f32(code))), code);
    }
    for low in 0..0x7eu8 {
        let middle = (f64::from(e4m3_to_f32(low)) + f64::from(e4m3_to_f32(low + 1))) / 2.0;
        assert_eq!(e4m3(middle), low + low % 2);
        assert_eq!(e4m3(-middle), 0x80 | (low + low % 2));
    }
    assert_eq!((e4m3_to_f32(0x7e), e4m3_to_f32(1)), (448.0, 2.0f32.powi(-9)));
    assert!(e4m3_to_f32(0x7f).is_nan());
}

#[test]
fn rows_of_nothing_and_rows_of_no_number_stay_so() {
    for kind in NARROW {
        for nothing in [0.0, 1e-40, -0.0] {
            assert!(kind.round(&[nothing; 8]).iter().all(|x| *x == 0.0), "{kind:?} {nothing}");
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut row = [1.0; 8];
            row[3] = bad;
            assert!(kind.round(&row).iter().all(|x| x.is_nan()), "{kind:?} {bad}");
        }
        assert!(kind.round(&[1e37; 8]).iter().all(|x| (x / 1e37 - 1.0).abs() < 0.6));
    }
}

#[test]
fn a_rotation_keeps_products_and_twice_is_its_factor() {
    for (dim, block) in [(1, 1), (20, 4), (96, 32), (64, 64)] {
        assert_eq!(rotation(dim), block);
        let [a, b] = [&rows(dim)[0], &rows(dim)[1]]
            .map(|row| row.iter().map(|x| f64::from(*x)).collect::<Vec<_>>());
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let (mut ra, mut rb) = (a.clone(), b.clone());
        rotate(&mut ra);
        rotate(&mut rb);
        assert!((dot(&ra, &rb) - block as f64 * dot(&a, &b)).abs() < 1e-9);
        rotate(&mut ra);
        assert!(ra.iter().zip(&a).all(|(x, a)| (x - block as f64 * a).abs() < 1e-9));
    }
    let mut row = [1.0f32, 0.0, 0.0, 0.0];
    rotate(&mut row);
    assert_eq!(row, [1.0; 4]);
}
