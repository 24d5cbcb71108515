//! Dealing heads to ranks: every head once, even, the same every time.

use moa_core::{ElasticRule, Error, HeadRule, ModelShape, Plan, Sharding};
use proptest::prelude::*;

const LENGTH: usize = 4096;

fn plan(kv_heads: usize, spans: &[usize]) -> Plan {
    let layers = spans.len() / kv_heads;
    let shape = ModelShape { layers, query_heads: 2 * kv_heads, kv_heads, head_dim: 8 };
    let rules = spans.iter().map(|span| HeadRule::from(ElasticRule::fixed(*span))).collect();
    Plan::new(shape, 0, 1, rules).unwrap()
}

/// Keys of a rank in each layer.
fn keys(sharding: &Sharding, plan: &Plan, rank: usize) -> Vec<usize> {
    let total = |layer| {
        let spans = plan.layer_spans(layer, LENGTH);
        sharding.heads(layer, rank).iter().map(|head| spans[*head].total()).sum()
    };
    (0..plan.shape().layers).map(total).collect()
}

fn spread(loads: impl Iterator<Item = usize> + Clone) -> usize {
    loads.clone().max().unwrap_or(0) - loads.min().unwrap_or(0)
}

/// Models of a few layers with any spans, and a number of ranks.
fn cases() -> impl Strategy<Value = (usize, Vec<usize>, usize)> {
    (1usize..=12, 1usize..=4).prop_flat_map(|(heads, layers)| {
        let span = prop_oneof![1usize..=LENGTH, Just(LENGTH), Just(80)];
        (Just(heads), prop::collection::vec(span, heads * layers), 1..=heads)
    })
}

proptest! {
    #[test]
    fn every_head_has_one_rank_and_its_plan_goes_with_it((heads, spans, ranks) in cases()) {
        let plan = plan(heads, &spans);
        let sharding = Sharding::balanced(&plan, LENGTH, ranks).unwrap();
        prop_assert_eq!(&sharding, &Sharding::balanced(&plan, LENGTH, ranks).unwrap());
        for layer in 0..plan.shape().layers {
            let mut all: Vec<usize> =
                (0..ranks).flat_map(|rank| sharding.heads(layer, rank).to_vec()).collect();
            all.sort_unstable();
            prop_assert_eq!(all, (0..heads).collect::<Vec<_>>());
        }
        let mut bytes = 0;
        for rank in 0..ranks {
            let own = sharding.plan(&plan, rank).unwrap();
            prop_assert_eq!(own.shape(), sharding.rank_shape(rank));
            prop_assert_eq!(own.shape().group(), plan.shape().group());
            for layer in 0..plan.shape().layers {
                let whole = plan.layer_spans(layer, LENGTH);
                let picked: Vec<_> =
                    sharding.heads(layer, rank).iter().map(|head| whole[*head]).collect();
                prop_assert!(picked.len() == heads / ranks || picked.len() == heads / ranks + 1);
                prop_assert_eq!(own.layer_spans(layer, LENGTH), picked);
            }
            bytes += own.kv_bytes(LENGTH, 256);
        }
        prop_assert_eq!(bytes, plan.kv_bytes(LENGTH, 256));
    }

    #[test]
    fn ranks_differ_by_no_more_than_two_heads_of_a_layer((heads, spans, ranks) in cases()) {
        let plan = plan(heads, &spans);
        let sharding = Sharding::balanced(&plan, LENGTH, ranks).unwrap();
        let loads: Vec<_> = (0..ranks).map(|rank| keys(&sharding, &plan, rank)).collect();
        let even = heads.is_multiple_of(ranks);
        let mut worst = 0;
        for (layer, spans) in spans.chunks(heads).enumerate() {
            let widest = spans.iter().copied().max().unwrap();
            // A rank with a head less counts as if that one saw nothing.
            let bound = if even { spread(spans.iter().copied()) } else { widest };
            let got = spread(loads.iter().map(|rank| rank[layer]));
            prop_assert!(got <= bound, "layer {layer}: {got} of {bound} in {loads:?}");
            worst = worst.max(got);
        }
        if even {
            let got = spread(loads.iter().map(|rank| rank.iter().sum()));
            prop_assert!(got <= worst, "in all {got} of {worst} in {loads:?}");
        }
    }

    #[test]
    fn two_ranks_are_close_to_the_best_split(spans in prop::collection::vec(1usize..=LENGTH, 8)) {
        let plan = plan(8, &spans);
        let sharding = Sharding::balanced(&plan, LENGTH, 2).unwrap();
        let got = (0..2).map(|rank| keys(&sharding, &plan, rank)[0]).max().unwrap();
        let all: usize = spans.iter().sum();
        let fuller = |set: u32| {
            let own: usize = (0..8).filter(|i| set >> i & 1 == 1).map(|i| spans[i]).sum();
            own.max(all - own)
        };
        let best = (0..1u32 << 8).filter(|set| set.count_ones() == 4).map(fuller).min().unwrap();
        prop_assert!(got as f64 <= 1.1 * best as f64, "{got}, best {best}: {spans:?}");
    }
}

#[test]
fn a_few_wide_heads_are_shared_out() {
    // Two layers with one wide head each: not both of them to one rank.
    let plan = plan(4, &[4000, 100, 100, 100, 100, 100, 100, 4000]);
    let sharding = Sharding::balanced(&plan, LENGTH, 2).unwrap();
    let totals = [0, 1].map(|rank| keys(&sharding, &plan, rank).iter().sum::<usize>());
    assert_eq!(totals, [4300, 4300]);
    // Three ranks of four heads: the first has two.
    let sharding = Sharding::balanced(&plan, LENGTH, 3).unwrap();
    assert_eq!([0, 1, 2].map(|rank| sharding.rank_shape(rank).kv_heads), [2, 1, 1]);
    assert_eq!([0, 1, 2].map(|rank| sharding.rank_shape(rank).query_heads), [4, 2, 2]);
}

#[test]
fn impossible_ranks_and_foreign_plans_are_refused() {
    let own = plan(4, &[10; 8]);
    for ranks in [0, 5] {
        match Sharding::balanced(&own, LENGTH, ranks) {
            Err(Error::Invalid { what, expected, got }) => {
                assert_eq!(
                    (&*what, &*expected, got),
                    ("ranks", "1 to 4 (KV heads)", ranks.to_string())
                );
            }
            other => panic!("{other:?}"),
        }
    }
    let sharding = Sharding::balanced(&own, LENGTH, 2).unwrap();
    let foreign = plan(8, &[10; 8]);
    assert!(matches!(sharding.plan(&foreign, 0), Err(Error::ShapeMismatch { .. })));
    assert!(matches!(sharding.plan(&own, 2), Err(Error::Invalid { .. })));
}
