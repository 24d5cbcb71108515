//! Few rows of activations: outputs of several layers in stretches, which threads share.

use std::ops::Range;

use super::{PANEL_ROWS, range};
use crate::pool::{self, SharedMut};

/// Most outputs of a task, the stride of what a task computes.
pub(super) const STRETCH: usize = 32;

/// Rows of weights that one task may take side by side: its outputs are a multiple of them but at the end of a layer.
pub(super) const SIDE: usize = 4;

/// Weights of a task: at the end of a call a thread waits for another one's last task.
const TASK: usize = 1 << 13;

/// What stretches of all layers are computed by: `dots(layer, outputs, y)` writes those of `m` rows, at a stride of
/// [`STRETCH`], `k` being above 0. A layer is the number of its outputs, and where they go. Threads are handed the work of all layers
/// once, and read what lies one after the other.
pub(super) fn for_each_stretch(
    (m, k): (usize, usize),
    layers: &[(usize, &SharedMut<'_, f32>)],
    dots: impl Fn(usize, Range<usize>, &mut [f32]) + Sync,
) {
    let each = (TASK / k).clamp(SIDE, STRETCH) / SIDE * SIDE;
    let stretches = |(n, _): &(usize, &SharedMut<'_, f32>)| n.div_ceil(each);
    let tasks = layers.iter().map(stretches).sum();
    let outputs: usize = layers.iter().map(|(n, _)| n).sum();
    pool::for_each_in_runs(tasks, (m * outputs * k) as u64, |task| {
        let (mut layer, mut stretch) = (0, task);
        while stretch >= stretches(&layers[layer]) {
            stretch -= stretches(&layers[layer]);
            layer += 1;
        }
        let (n, out) = layers[layer];
        let own = range(stretch, each, n);
        // A single row, of which decode has nothing else, does not clear the room of many.
        let (mut one, mut all);
        let y: &mut [f32] = if m == 1 {
            one = [0.0; STRETCH];
            &mut one
        } else {
            all = [0.0; PANEL_ROWS * STRETCH];
            &mut all
        };
        dots(layer, own.clone(), y);
        for (i, y) in y.chunks_exact(STRETCH).take(m).enumerate() {
            // SAFETY: each task has columns of its own.
            let to = unsafe { out.slice(i * n + own.start, own.len()) };
            to.copy_from_slice(&y[..own.len()]);
        }
    });
}
