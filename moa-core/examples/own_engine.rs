//! A per-head KV cache in an engine of one's own: plan and geometry come from moa-core, storage and
//! attention from the engine.
//!
//! ```sh
//! cargo run --release -p moa-core --example own_engine
//! ```

use std::sync::Arc;

use moa_core::{CacheState, ElasticRule, LayerLayout, ModelShape, Plan, Position, Result};

/// One sequence in one layer of the engine: keys only, one number per slot, to keep it short.
struct EngineCache {
    state: CacheState,
    keys: Vec<f32>,
}

impl EngineCache {
    /// What a step does: every query of the chunk reads its visible keys, then the chunk is stored.
    fn extend(&mut self, chunk: &[f32]) -> Result<Vec<Vec<f32>>> {
        self.state.check_append(chunk.len())?;
        let len = self.state.len();
        let mut sums = Vec::new();
        for head in self.state.layout().heads() {
            let mut of_head = Vec::new();
            for query in len..len + chunk.len() {
                // Keys that are cached already, as a few contiguous stretches of slots ...
                let cached = head.cached_keys(len, query..query + 1);
                let mut sum: f32 = cached
                    .into_iter()
                    .flat_map(|positions| head.runs(positions))
                    .flat_map(|run| &self.keys[run.slot.0..run.slot.0 + run.len])
                    .sum();
                // ... and keys of the chunk itself.
                for (i, key) in chunk.iter().enumerate() {
                    if head.span().attends(Position(query), Position(len + i)) {
                        sum += key;
                    }
                }
                of_head.push(sum);
            }
            sums.push(of_head);
        }
        for head in self.state.layout().heads() {
            for run in head.append(len, chunk.len()) {
                let from = run.position.0 - len;
                self.keys[run.slot.0..run.slot.0 + run.len]
                    .copy_from_slice(&chunk[from..from + run.len]);
            }
        }
        self.state.append(chunk.len())?;
        Ok(sums)
    }
}

fn main() -> Result<()> {
    let shape = ModelShape { layers: 1, query_heads: 4, kv_heads: 2, head_dim: 1 };
    // KV head 0 sees everything, head 1 two sinks and six recent keys.
    let plan = Plan::retrieval_heads(shape, 2, 6, &[(0, 0)])?;
    let context = 64;
    let layout = LayerLayout::new(&plan.layer_spans(0, context), context, 0)?;
    println!(
        "{} slots instead of {} (density {:.3})",
        layout.slots(),
        2 * context,
        plan.density(context)
    );
    let keys = vec![0.0; layout.slots()];
    let state = CacheState::new(Arc::new(layout), shape.head_dim);
    let mut cache = EngineCache { state, keys };

    // With all keys 1, the sum is the number of keys that a query sees.
    let prompt = vec![1.0; 40];
    let counts = cache.extend(&prompt)?;
    println!("last token of the prompt sees {} and {} keys", counts[0][39], counts[1][39]);
    let counts = cache.extend(&[1.0])?;
    println!("the next token sees {} and {} keys", counts[0][0], counts[1][0]);
    assert_eq!((counts[0][0], counts[1][0]), (41.0, 8.0));

    let elastic = ElasticRule::new(32.0, 0.125)?;
    for n in [512, 1024, 8192] {
        println!("an elastic rule at {n} tokens: {} keys", elastic.span(n, 8));
    }
    Ok(())
}
