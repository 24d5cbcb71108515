//! Tokens drawn on the device, against the probabilities that they should have.

use moa_backend_cuda::{Device, Draw, Dtype, Error, Operations, Tensor};
use moa_conformance::{Stop, Trial, Verdict, trials};
use moa_core::SplitMix64;

use super::gpu::device;

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        evenly_spread_numbers_draw_tokens_in_proportion,
        large_vocabularies_are_drawn_from_to_their_ends,
        draws_are_those_of_sums_in_double_precision,
        rows_that_are_drawn_in_other_ways_get_what_they_get_alone,
        what_cannot_be_drawn_from_is_told,
        what_lies_on_another_device_is_refused,
    ]
}

const PLAIN: Draw = Draw { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

/// Draws `units.len()` tokens from the same logits.
fn draw(operations: &Operations, logits: &[f32], draw: Draw, units: &[f64]) -> Vec<i32> {
    let rows = logits.repeat(units.len());
    let shape = [units.len(), logits.len()];
    let rows = Tensor::from_f32(operations.device(), &rows, &shape, Dtype::F32).unwrap();
    let into = operations.indices(units.iter().map(|_| 0), 1).unwrap();
    operations.sample(&rows, &vec![draw; units.len()], units, &into).unwrap();
    into.to_host().unwrap()
}

/// Numbers spread evenly over [0, 1).
fn units(n: usize) -> Vec<f64> {
    (0..n).map(|i| (i as f64 + 0.5) / n as f64).collect()
}

fn operations() -> Result<Operations, Stop> {
    Ok(Operations::new(device()?, Dtype::Bf16)?)
}

/// Logits whose probabilities are `.5, .25, .125, .0625, .0625`, after many of none.
fn halves() -> Vec<f32> {
    let mut logits = vec![f32::NEG_INFINITY; 5000];
    let last = [0.5f32, 0.25, 0.125, 0.0625, 0.0625].map(f32::ln);
    logits[4995..].copy_from_slice(&last);
    logits
}

fn evenly_spread_numbers_draw_tokens_in_proportion() -> Verdict {
    let operations = operations()?;
    let count = |logits: &[f32], how: Draw| {
        let mut counts = [0; 5];
        for token in draw(&operations, logits, how, &units(1600)) {
            counts[usize::try_from(token).unwrap() - 4995] += 1;
        }
        counts
    };
    let near = |got: [i32; 5], expected: [i32; 5]| {
        let fine = got.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 1);
        assert!(fine, "{got:?}, expected {expected:?}");
    };
    near(count(&halves(), PLAIN), [800, 400, 200, 100, 100]);
    // Squared odds: 64, 16, 4, 1, 1 of 86.
    let cold = Draw { temperature: 0.5, ..PLAIN };
    near(count(&halves(), cold), [1191, 298, 74, 19, 19]);
    near(count(&halves(), Draw { top_k: 2, ..PLAIN }), [1067, 533, 0, 0, 0]);
    near(count(&halves(), Draw { top_k: 1, ..PLAIN }), [1600, 0, 0, 0, 0]);
    // Ties of the last one stay.
    near(count(&halves(), Draw { top_k: 4, ..PLAIN }), [800, 400, 200, 100, 100]);
    near(count(&halves(), Draw { top_p: 0.7, ..PLAIN }), [1067, 533, 0, 0, 0]);
    near(count(&halves(), Draw { top_p: 0.8, ..PLAIN }), [914, 457, 229, 0, 0]);
    near(count(&halves(), Draw { top_p: 0.01, ..PLAIN }), [1600, 0, 0, 0, 0]);
    near(count(&halves(), Draw { min_p: 0.24, ..PLAIN }), [914, 457, 229, 0, 0]);
    near(count(&halves(), Draw { min_p: 1.0, ..PLAIN }), [1600, 0, 0, 0, 0]);
    // Top-p counts what top-k left: .5 of .75 is two thirds.
    near(count(&halves(), Draw { top_k: 2, top_p: 0.6, ..PLAIN }), [1600, 0, 0, 0, 0]);
    Ok(())
}

fn large_vocabularies_are_drawn_from_to_their_ends() -> Verdict {
    let operations = operations()?;
    let vocab = 128_256;
    let flat = vec![3.0; vocab];
    let drawn = draw(&operations, &flat, PLAIN, &[0.0, 0.5, 1.0 - 1e-9]);
    assert_eq!(drawn[0], 0);
    assert!((drawn[1] - vocab as i32 / 2).abs() <= 1, "{drawn:?}");
    assert!(drawn[2] >= vocab as i32 - 2, "{drawn:?}");
    let mut peak = flat;
    peak[77_777] = 40.0;
    assert_eq!(draw(&operations, &peak, PLAIN, &units(9)), [77_777; 9]);
    let again =
        draw(&operations, &peak, Draw { top_p: 0.9, temperature: 30.0, ..PLAIN }, &units(64));
    for _ in 0..5 {
        let draw_again = Draw { top_p: 0.9, temperature: 30.0, ..PLAIN };
        assert_eq!(draw(&operations, &peak, draw_again, &units(64)), again);
    }
    Ok(())
}

/// The shares of all kept weights, in the order of ids, at which each token begins and ends, by sums in f64.
fn expected(logits: &[f32], how: Draw) -> Vec<(f64, f64)> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |z: &f32| ((f64::from(*z) - f64::from(most)) / f64::from(how.temperature)).exp();
    let weights: Vec<f64> = logits.iter().map(weight).collect();
    let mut sorted = weights.clone();
    sorted.sort_by(|a, b| b.total_cmp(a));
    if let Some(last) = how.top_k.checked_sub(1).and_then(|last| sorted.get(last).copied()) {
        sorted.retain(|w| *w >= last);
    }
    let wanted = f64::from(how.top_p) * sorted.iter().sum::<f64>();
    let mut sum = 0.0;
    let last = sorted.iter().find(|w| {
        sum += *w;
        sum >= wanted
    });
    let least = last.or(sorted.last()).copied().unwrap_or(0.0).max(f64::from(how.min_p));
    let kept = |w: f64| if w >= least { w } else { 0.0 };
    let total: f64 = weights.iter().map(|w| kept(*w)).sum();
    let mut sum = 0.0;
    let share = |w: &f64| {
        let begin = sum / total;
        sum += kept(*w);
        (begin, sum / total)
    };
    weights.iter().map(share).collect()
}

fn draws_are_those_of_sums_in_double_precision() -> Verdict {
    let operations = operations()?;
    let mut random = SplitMix64::new(11);
    let mut uniform = || (random.next_u64() >> 40) as f32 / (1 << 24) as f32;
    // Few and many exponents, whose largest weights differ by more than they are rounded, many equal weights, none at all, and rows that no number of threads or reads divides.
    type Logit = fn(f32) -> f32;
    let kinds: [(usize, Logit); 4] = [
        (128_256, |x| 2.0 * x),
        (50_257, |x| 30.0 * x * x),
        (9_001, |x| (8.0 * x).floor()),
        (8_200, |x| if x < 0.6 { f32::NEG_INFINITY } else { 9.0 * x }),
    ];
    let ways = [
        PLAIN,
        Draw { top_p: 0.95, temperature: 0.8, ..PLAIN },
        Draw { top_k: 40, ..PLAIN },
        Draw { top_k: 1000, top_p: 0.5, ..PLAIN },
        Draw { min_p: 0.2, temperature: 1.7, ..PLAIN },
    ];
    for (vocab, logit) in kinds {
        let logits: Vec<f32> = (0..vocab).map(|_| logit(uniform())).collect();
        for how in ways {
            let shares = expected(&logits, how);
            let units = units(200);
            for (unit, token) in units.iter().zip(draw(&operations, &logits, how, &units)) {
                let (begin, end) = shares[usize::try_from(token).unwrap()];
                // Weights are those of an exponential of 22 bits, and those kept may end one weight earlier or later.
                let is_near = begin - 2e-4 <= *unit && *unit <= end + 2e-4;
                assert!(is_near, "{vocab} {how:?}: {token} of {begin} to {end} at {unit}");
            }
        }
    }
    Ok(())
}

fn rows_that_are_drawn_in_other_ways_get_what_they_get_alone() -> Verdict {
    let operations = operations()?;
    let vocab = 32_000;
    let mut random = SplitMix64::new(3);
    let mut noise = |n: usize| -> Vec<f32> {
        (0..n).map(|_| (random.next_u64() >> 40) as f32 / (1 << 21) as f32).collect()
    };
    let ways = [
        PLAIN,
        Draw { temperature: 0.0, ..PLAIN },
        Draw { temperature: 0.6, top_k: 40, ..PLAIN },
        Draw { temperature: 0.0, top_k: 3, top_p: 0.1, min_p: 1.0 },
        Draw { temperature: 1.3, top_p: 0.9, ..PLAIN },
        Draw { min_p: 0.05, ..PLAIN },
        Draw { temperature: 0.9, top_k: 1000, top_p: 0.5, min_p: 0.01 },
    ];
    let draws: Vec<Draw> = (0..64).map(|row| ways[row % ways.len()]).collect();
    let units = units(64);
    let mut logits = noise(64 * vocab);
    // The likeliest of row 1 twice: the lower one is taken.
    (logits[vocab + 77], logits[vocab + 31_999]) = (99.0, 99.0);
    // A row that cannot be drawn from is its own affair.
    logits[3 * vocab] = f32::NAN;
    let tensor = |values: &[f32], rows| {
        Tensor::from_f32(operations.device(), values, &[rows, vocab], Dtype::F32)
    };
    let into = operations.indices(draws.iter().map(|_| 0), 1)?;
    operations.sample(&tensor(&logits, 64)?, &draws, &units, &into)?;
    let together = into.to_host()?;
    assert_eq!((together[1], together[3]), (77, -1));
    for (row, logits) in logits.chunks(vocab).enumerate() {
        let (one, alone) = (tensor(logits, 1)?, operations.indices([0].into_iter(), 1)?);
        operations.sample(&one, &draws[row..=row], &units[row..=row], &alone)?;
        let alone = alone.to_host()?[0];
        assert_eq!(together[row], alone, "row {row}, {:?}", draws[row]);
        if draws[row].temperature == 0.0 {
            let likeliest = operations.indices([0].into_iter(), 1)?;
            operations.argmax(&one, &likeliest)?;
            assert_eq!(likeliest.to_host()?, [alone], "row {row}");
        }
    }
    Ok(())
}

fn what_cannot_be_drawn_from_is_told() -> Verdict {
    let operations = operations()?;
    for bad in [f32::NAN, f32::INFINITY] {
        assert_eq!(draw(&operations, &[1.0, bad, 2.0], PLAIN, &[0.5]), [-1]);
    }
    assert_eq!(draw(&operations, &[f32::NEG_INFINITY; 3], PLAIN, &[0.5]), [-1]);
    let logits = Tensor::zeros(operations.device(), &[2, 8], Dtype::F32).unwrap();
    let into = operations.indices([0, 0].into_iter(), 1).unwrap();
    for (how, units) in [
        (Draw { temperature: -0.1, ..PLAIN }, [0.5; 2]),
        (Draw { temperature: f32::INFINITY, ..PLAIN }, [0.5; 2]),
        (Draw { top_p: 0.0, ..PLAIN }, [0.5; 2]),
        (Draw { min_p: -0.1, ..PLAIN }, [0.5; 2]),
        (PLAIN, [0.5, 1.0]),
    ] {
        for draws in [[how, PLAIN], [PLAIN, how]] {
            let refused = operations.sample(&logits, &draws, &units, &into);
            assert!(matches!(refused, Err(Error::Argument(_))), "{draws:?}");
        }
    }
    for (draws, units) in [(2, 1), (1, 2)] {
        let refused = operations.sample(&logits, &vec![PLAIN; draws], &vec![0.5; units], &into);
        assert!(matches!(refused, Err(Error::Argument(_))));
    }
    Ok(())
}

/// Two devices of one ordinal have streams of their own: what one frees or writes, the other may still read.
fn what_lies_on_another_device_is_refused() -> Verdict {
    let operations = operations()?;
    let other = Operations::new(&Device::open(0)?, Dtype::Bf16)?;
    let [own, foreign] = [&operations, &other].map(|of| {
        let logits = Tensor::from_f32(of.device(), &[0.0, 1.0, 0.5], &[1, 3], Dtype::F32).unwrap();
        (logits, of.indices([0].into_iter(), 1).unwrap())
    });
    for (logits, into) in [(&foreign.0, &own.1), (&own.0, &foreign.1), (&foreign.0, &foreign.1)] {
        for result in
            [operations.argmax(logits, into), operations.sample(logits, &[PLAIN], &[0.5], into)]
        {
            let Err(Error::Argument(error)) = result else { panic!("{result:?}") };
            assert!(error.to_string().contains("another"), "{error}");
        }
    }
    assert_eq!([own.1.to_host()?, foreign.1.to_host()?], [[0], [0]], "nothing was written");
    operations.argmax(&own.0, &own.1)?;
    assert_eq!(own.1.to_host()?, [1]);
    Ok(())
}
