//! Plans that were published with models.

use moa_conformance::{Trial, Verdict, trials};
use moa_core::{ModelShape, Plan, Sharding};

use crate::test_data;

pub(crate) fn trials() -> Vec<Trial> {
    trials![
        published_plans_have_the_densities_of_their_unions,
        published_plans_are_dealt_more_evenly_than_neighbours,
    ]
}

/// Densities of the published plans in the native GQA cache, as computed from the published files.
fn published_plans_have_the_densities_of_their_unions() -> Verdict {
    let plans = test_data("plans")?;
    let shape = |layers, query_heads, kv_heads, head_dim| ModelShape {
        layers,
        query_heads,
        kv_heads,
        head_dim,
    };
    for (name, shape, expected) in [
        ("gradientai--Llama-3-8B-Instruct-262k", shape(32, 32, 8, 128), 0.655),
        ("gradientai--Llama-3-70B-Instruct-262k", shape(80, 64, 8, 128), 0.661),
        ("meta-llama--Llama-3.2-1B-Instruct", shape(16, 32, 8, 64), 0.659),
        ("meta-llama--Llama-3.2-3B-Instruct", shape(28, 24, 8, 128), 0.551),
    ] {
        let path = plans.join(name).join("moa_alpha_beta.json");
        let plan = Plan::load_published(path, shape, 64, 128).unwrap();
        let density = plan.density(8192);
        assert!((density - expected).abs() < 1e-3, "{name}: {density}");
        let again = plan.to_published_json().unwrap();
        assert_eq!(Plan::from_published_json(&again, shape, 64, 128).unwrap(), plan);
    }
    Ok(())
}

/// Largest rank's keys layer by layer, which is what ranks wait for, and in all, over an even share.
fn unevenness(
    plan: &Plan,
    length: usize,
    owned: impl Fn(usize, usize) -> Vec<usize>,
    ranks: usize,
) -> [f64; 2] {
    let (mut waited, mut totals) = (0, vec![0; ranks]);
    for layer in 0..plan.shape().layers {
        let spans = plan.layer_spans(layer, length);
        let loads =
            (0..ranks).map(|rank| owned(layer, rank).iter().map(|h| spans[*h].total()).sum());
        let loads: Vec<usize> = loads.collect();
        waited += loads.iter().max().unwrap();
        totals.iter_mut().zip(&loads).for_each(|(total, load)| *total += load);
    }
    let even = totals.iter().sum::<usize>() as f64 / ranks as f64;
    [waited as f64 / even, *totals.iter().max().unwrap() as f64 / even]
}

/// Of published plans, against the usual split into neighbouring heads.
fn published_plans_are_dealt_more_evenly_than_neighbours() -> Verdict {
    let plans = test_data("plans")?;
    for (name, layers, query_heads, kv_heads) in [
        ("lmsys--vicuna-7b-v1.5-16k", 32, 32, 32),
        ("gradientai--Llama-3-8B-Instruct-262k", 32, 32, 8),
        ("gradientai--Llama-3-70B-Instruct-262k", 80, 64, 8),
    ] {
        let shape = ModelShape { layers, query_heads, kv_heads, head_dim: 128 };
        let path = plans.join(name).join("moa_alpha_beta.json");
        let plan = Plan::load_published(path, shape, 64, 128).unwrap();
        for ranks in [2, 4, 8] {
            let sharding = Sharding::balanced(&plan, 8192, ranks).unwrap();
            let own = |layer, rank| sharding.heads(layer, rank).to_vec();
            let dealt = unevenness(&plan, 8192, own, ranks);
            let each = kv_heads / ranks;
            let neighbours = |_, rank| (rank * each..(rank + 1) * each).collect();
            let usual = unevenness(&plan, 8192, neighbours, ranks);
            println!("{name}, {ranks} ranks: dealt {dealt:.3?}, neighbours {usual:.3?}");
            assert!(dealt[0] <= usual[0] && dealt[1] <= 1.03, "{dealt:?}");
        }
    }
    Ok(())
}
