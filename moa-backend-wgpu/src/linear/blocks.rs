//! Matrices in quantised blocks on their way to the device, and widened on it.

use moa_core::BlockType;

use crate::attention::{arg, words};
use crate::kernels::quants::{Elements, GROUP, KEPT, widen_blocks};
use crate::{Device, Dtype, Error, Matrix, Result, Tensor};

/// Bytes that groups' steps are padded to.
const LOAD: usize = 16;

impl Matrix {
    /// Whether a matrix of such blocks can stay in them.
    #[must_use]
    pub fn keeps(kind: BlockType) -> bool {
        KEPT.contains(&kind)
    }

    /// Copies blocks, whole ones in each row, to the device, where they have as many bytes.
    ///
    /// # Errors
    /// [`Error::Argument`] unless the blocks are [kept](Self::keeps) and make up a matrix with elements,
    /// [`Error::TooLarge`].
    pub fn in_blocks(
        device: &Device,
        blocks: &[u8],
        rows: usize,
        cols: usize,
        kind: BlockType,
    ) -> Result<Self> {
        const OP: &str = "Matrix::in_blocks";
        if !Self::keeps(kind) {
            let expected = KEPT.map(BlockType::name).join(", ");
            return Err(Error::argument(OP, "kind", expected, kind));
        }
        let (len, size) = (kind.block_len(), kind.block_bytes());
        let count = rows.checked_mul(cols / len).and_then(|n| n.checked_mul(size));
        if !cols.is_multiple_of(len) || count != Some(blocks.len()) || blocks.is_empty() {
            let expected = format_args!("{kind} blocks of [{rows}, {cols}]").to_string();
            return Err(Error::shape(OP, "blocks", expected, &[blocks.len()]));
        }
        let (words, steps) = arranged(kind, blocks);
        let (bytes, limit) = (words.len() as u64, device.max_buffer_bytes());
        if bytes > limit {
            return Err(Error::TooLarge { what: "weight", bytes, limit });
        }
        device.alive("weight")?;
        let words = device.long_lived(|client| client.create_from_slice(&words));
        Ok(Self::of(device, words, [rows, cols], Elements::Blocks(kind), steps))
    }

    /// The same numbers as f32, rows of `ids` or all of them, times `factor`.
    pub(crate) fn widened(&self, ids: Option<&[u32]>, factor: f32) -> Result<Tensor> {
        let rows = ids.map_or(self.rows(), <[u32]>::len);
        let device = self.device();
        let out = Tensor::uninitialised(device, "widen", &[rows, self.cols()])?;
        if rows == 0 {
            return Ok(out);
        }
        let loads = self.cols() / self.elements.per_load();
        let (cubes, dim) = device.cubes(rows * loads);
        let places = ids.map(|ids| device.client().create_from_slice(bytemuck::cast_slice(ids)));
        // SAFETY: there is a unit for each load; ids are rows of the table.
        unsafe {
            widen_blocks::launch_unchecked(
                device.client(),
                cubes,
                dim,
                arg(&self.words),
                arg(places.as_ref().unwrap_or(&self.words)),
                arg(out.handle()),
                (rows * loads) as u32,
                loads as u32,
                self.steps as u32,
                u32::from(ids.is_some()),
                factor,
                self.elements,
            );
        }
        Ok(out)
    }

    /// The same numbers as a matrix of this type, for once.
    pub(crate) fn as_plain(&self, dtype: Dtype) -> Result<Self> {
        let wide = self.widened(None, 1.0)?;
        let dtype = if dtype == Dtype::F16 { dtype } else { Dtype::F32 };
        let words = words(self.device(), &wide, dtype)?;
        let shape = [self.rows(), self.cols()];
        Ok(Self::of(self.device(), words, shape, Elements::Plain(dtype), 0))
    }
}

/// Codes and steps as the kernels read them, and where the steps begin, in loads.
fn arranged(kind: BlockType, blocks: &[u8]) -> (Vec<u8>, usize) {
    let (mut codes, mut steps) = (Vec::with_capacity(blocks.len() + LOAD), Vec::new());
    for block in blocks.chunks_exact(kind.block_bytes()) {
        match kind {
            BlockType::Q4K => {
                steps.extend_from_slice(&block[..16]);
                for pair in block[16..].chunks_exact(GROUP) {
                    for shift in [0, 4] {
                        let code = |i: usize| pair[i] >> shift & 15;
                        codes.extend((0..16).map(|i| code(i) | code(i + 16) << 4));
                    }
                }
            }
            _ => {
                steps.extend_from_slice(&block[..2]);
                codes.extend_from_slice(&block[2..]);
            }
        }
    }
    let at = codes.len() / LOAD;
    codes.append(&mut steps);
    codes.resize(codes.len().next_multiple_of(LOAD), 0);
    (codes, at)
}
