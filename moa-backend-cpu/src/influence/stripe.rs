use std::iter::StepBy;
use std::ops::Range;

use moa_core::InfluenceInputs;
use pulp::Simd;

use super::sweep::{Sweep, sweep};
use super::{BLOCKS, Shape};
use crate::pool::SharedMut;
use crate::simd::outer::{LANES, Outer, PANEL, pack_columns};
use crate::workspace::{self, Workspace};
use crate::zeroed::zeroed;
use crate::{Result, Tensor};

/// Keys per tile.
const TILE_KEYS: usize = 128;

/// Some query tiles of one KV head, over all keys before them.
pub(super) struct Stripe<'a> {
    pub(super) inputs: &'a InfluenceInputs<'a, Tensor>,
    pub(super) shape: Shape,
    pub(super) scale: f32,
    pub(super) kv_head: usize,
    /// The head's keys and values, `[tokens, dim]`.
    pub(super) keys: &'a [f32],
    pub(super) values: &'a [f32],
    pub(super) tiles: StepBy<Range<usize>>,
    pub(super) d_q: Option<&'a SharedMut<'a, f32>>,
}

/// What one stripe adds to the results.
pub(super) struct StripeSums {
    /// Per query tile: its first block of queries, and the sums of its `[query blocks, blocks]`.
    pub(super) blocks: Vec<(usize, Vec<f64>)>,
    /// `[dim panels, tokens, PANEL]`, empty without gradients; so is `d_v`.
    pub(super) d_k: Vec<f32>,
    pub(super) d_v: Vec<f32>,
}

/// Buffers of one query tile and query head.
struct Panel<'a> {
    /// `[dim, PANEL]`: queries times scale, for scores to the base 2.
    q: &'a mut [f32],
    /// `[dim, PANEL]`.
    d_out: &'a mut [f32],
    /// `[dim panels, PANEL rows, PANEL]`: rows as they are, for the products that sum over rows.
    q_rows: &'a mut [f32],
    d_out_rows: &'a mut [f32],
    /// `[dim, PANEL]`.
    d_q: &'a mut [f32],
    lse: &'a mut [f32],
    /// `D_i = dO_i . O_i`
    dots: &'a mut [f32],
}

impl workspace::Task for Stripe<'_> {
    type Output = Result<StripeSums>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S, workspace: &mut Workspace) -> Result<StripeSums> {
        let Shape { tokens, group, dim, .. } = self.shape;
        let rows_len = self.shape.dim_panels() * PANEL * PANEL;
        let sums_len =
            if self.d_q.is_some() { self.shape.dim_panels() * tokens * PANEL } else { 0 };
        let mut sums = StripeSums {
            blocks: Vec::new(),
            d_k: zeroed(sums_len, "gradients by keys")?,
            d_v: zeroed(sums_len, "gradients by values")?,
        };
        let panel_len = 3 * dim * PANEL + 2 * rows_len + 2 * PANEL;
        let [scores, products, panels] =
            workspace.parts([TILE_KEYS * PANEL, TILE_KEYS * PANEL, group * panel_len])?;

        for tile in self.tiles.clone() {
            let queries = tile * PANEL..tokens.min((tile + 1) * PANEL);
            let mut active: Vec<(usize, Panel<'_>)> = panels
                .chunks_exact_mut(panel_len)
                .enumerate()
                .map(|(head, buffer)| (self.kv_head * group + head, split(buffer, dim, rows_len)))
                .collect();
            active.retain_mut(|(head, panel)| self.pack(*head, &queries, panel));
            if active.is_empty() {
                continue;
            }
            let first_block = queries.start / self.shape.block;
            let query_blocks = (queries.end - 1) / self.shape.block + 1 - first_block;
            let mut blocks = zeroed(query_blocks * self.shape.blocks(), BLOCKS)?;

            // The first key that the first query sees.
            let first = (queries.start + 1).saturating_sub(self.shape.window);
            for start in (first / TILE_KEYS * TILE_KEYS..queries.end).step_by(TILE_KEYS) {
                let range = start..queries.end.min(start + TILE_KEYS);
                let rows = range.start * dim..range.end * dim;
                let (keys, values) = (&self.keys[rows.clone()], &self.values[rows]);
                for (_, panel) in &mut active {
                    let tile = Tile { queries: &queries, keys: &range, blocks: &mut blocks };
                    self.panel(simd, panel, tile, (keys, values), (scores, products), &mut sums);
                }
            }
            if let Some(d_q) = self.d_q {
                for (head, panel) in &active {
                    self.write_d_q(d_q, *head, &queries, panel.d_q);
                }
            }
            sums.blocks.push((first_block, blocks));
        }
        Ok(sums)
    }
}

impl Stripe<'_> {
    /// One query head's tile of queries against one tile of keys.
    #[inline(always)]
    fn panel<S: Simd>(
        &self,
        simd: S,
        panel: &mut Panel<'_>,
        tile: Tile<'_>,
        (keys, values): (&[f32], &[f32]),
        (scores, products): (&mut [f32], &mut [f32]),
        sums: &mut StripeSums,
    ) {
        let Shape { tokens, dim, block, window, .. } = self.shape;
        let (n, rows) = (tile.keys.len(), tile.queries.len());
        let width = rows.next_multiple_of(LANES);
        let product = |a: &[f32], b: &[f32], c: &mut [f32]| {
            let b_row = dim;
            simd.vectorize(Outer {
                k: dim,
                n,
                width,
                a,
                b,
                b_step: 1,
                b_row,
                c,
                accumulate: false,
            });
        };
        product(panel.q, keys, scores);
        product(panel.d_out, values, products);
        sweep(
            simd,
            Sweep {
                first_query: tile.queries.start,
                queries: rows,
                keys: tile.keys.clone(),
                width,
                window,
                block,
                sign: self.inputs.sign,
                gradient_scale: self.d_q.map(|_| self.scale),
                lse: panel.lse,
                dots: panel.dots,
                scores,
                products,
                blocks: tile.blocks,
                block_columns: self.shape.blocks(),
            },
        );
        if self.d_q.is_none() {
            return;
        }
        let d_q = &mut *panel.d_q;
        simd.vectorize(Outer {
            k: n,
            n: dim,
            width,
            a: products,
            b: keys,
            b_step: dim,
            b_row: 1,
            c: d_q,
            accumulate: true,
        });
        for p in 0..self.shape.dim_panels() {
            let width = (dim - p * PANEL).min(PANEL).next_multiple_of(LANES);
            let at = (p * tokens + tile.keys.start) * PANEL;
            let add = |a: &[f32], b: &[f32], c: &mut [f32]| {
                let a = &a[p * PANEL * PANEL..][..PANEL * PANEL];
                simd.vectorize(Outer {
                    k: rows,
                    n,
                    width,
                    a,
                    b,
                    b_step: 1,
                    b_row: PANEL,
                    c,
                    accumulate: true,
                });
            };
            add(panel.q_rows, products, &mut sums.d_k[at..][..n * PANEL]);
            add(panel.d_out_rows, scores, &mut sums.d_v[at..][..n * PANEL]);
        }
    }

    /// Packs one query head's rows; false if no gradient flows into any of them.
    fn pack(&self, head: usize, queries: &Range<usize>, panel: &mut Panel<'_>) -> bool {
        let Shape { query_heads, dim, .. } = self.shape;
        let row = |tensor: &'_ Tensor, query: usize| -> Range<usize> {
            debug_assert_eq!(tensor.row_len(), query_heads * dim);
            let start = (query * query_heads + head) * dim;
            start..start + dim
        };
        let inputs = self.inputs;
        let d_out = inputs.d_out.data();
        if queries.clone().all(|i| d_out[row(inputs.d_out, i)].iter().all(|&x| x == 0.0)) {
            return false;
        }
        panel.q.fill(0.0);
        panel.d_out.fill(0.0);
        panel.d_q.fill(0.0);
        panel.dots.fill(0.0);
        // Rows of padding see nothing.
        panel.lse.fill(1e30);
        let to_log2 = std::f32::consts::LOG2_E;
        let q = inputs.q.data();
        let rows = queries.clone().enumerate();
        let q_rows = rows.clone().map(|(r, i)| (r, &q[row(inputs.q, i)]));
        pack_columns(panel.q, q_rows, |x| x * (self.scale * to_log2));
        pack_columns(panel.d_out, rows.map(|(r, i)| (r, &d_out[row(inputs.d_out, i)])), |x| x);
        for (r, i) in queries.clone().enumerate() {
            let q = &q[row(inputs.q, i)];
            let d_out = &d_out[row(inputs.d_out, i)];
            let out = &inputs.out.data()[row(inputs.out, i)];
            panel.lse[r] = inputs.lse.data()[i * query_heads + head] * to_log2;
            panel.dots[r] = d_out.iter().zip(out).map(|(x, y)| x * y).sum();
            if self.d_q.is_some() {
                for (p, (q, d_out)) in q.chunks(PANEL).zip(d_out.chunks(PANEL)).enumerate() {
                    let at = (p * PANEL + r) * PANEL;
                    for (rows, from) in [(&mut *panel.q_rows, q), (&mut *panel.d_out_rows, d_out)] {
                        rows[at..][..from.len()].copy_from_slice(from);
                        rows[at + from.len()..at + PANEL].fill(0.0);
                    }
                }
            }
        }
        true
    }

    fn write_d_q(
        &self,
        d_q: &SharedMut<'_, f32>,
        head: usize,
        queries: &Range<usize>,
        panel: &[f32],
    ) {
        let Shape { query_heads, dim, .. } = self.shape;
        for (r, i) in queries.clone().enumerate() {
            // SAFETY: only this stripe has this query head and token.
            let row = unsafe { d_q.slice((i * query_heads + head) * dim, dim) };
            row.iter_mut().zip(panel.chunks_exact(PANEL)).for_each(|(to, from)| *to = from[r]);
        }
    }
}

struct Tile<'a> {
    queries: &'a Range<usize>,
    keys: &'a Range<usize>,
    blocks: &'a mut [f64],
}

fn split(buffer: &mut [f32], dim: usize, rows_len: usize) -> Panel<'_> {
    let mut rest = buffer;
    let mut part = |len: usize| {
        let (part, tail) = std::mem::take(&mut rest).split_at_mut(len);
        rest = tail;
        part
    };
    Panel {
        q: part(dim * PANEL),
        d_out: part(dim * PANEL),
        q_rows: part(rows_len),
        d_out_rows: part(rows_len),
        d_q: part(dim * PANEL),
        lse: part(PANEL),
        dots: part(PANEL),
    }
}
