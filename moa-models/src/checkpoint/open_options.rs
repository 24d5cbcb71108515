use std::path::Path;

use crate::Result;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::gguf::{Gguf, is_gguf};
use crate::checkpoint::safetensors::{Tensors, Weights};
use crate::decoder::shard::Shard;
use crate::device::Math;
use crate::families::{FAMILIES, Family};

/// How a model folder is opened: of which families its model may be, and what is overlooked.
///
/// ```no_run
/// use moa_models::{Cpu, OpenOptions};
///
/// let options = OpenOptions::default().ignore_extra_tensors(true);
/// let checkpoint = options.open(Cpu::default(), "model")?;
/// # Ok::<(), moa_models::Error>(())
/// ```
#[derive(Clone, Copy)]
pub struct OpenOptions<'a> {
    pub(crate) families: &'a [&'a dyn Family],
    pub(crate) ignore_extra_tensors: bool,
    pub(crate) mmap: bool,
    pub(crate) random_weights: Option<u32>,
}

impl std::fmt::Debug for OpenOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let families: Vec<_> = self.families.iter().map(|family| family.model_types()).collect();
        f.debug_struct("OpenOptions")
            .field("families", &families)
            .field("ignore_extra_tensors", &self.ignore_extra_tensors)
            .field("mmap", &self.mmap)
            .field("random_weights", &self.random_weights)
            .finish()
    }
}

impl Default for OpenOptions<'_> {
    fn default() -> Self {
        Self { families: FAMILIES, ignore_extra_tensors: false, mmap: true, random_weights: None }
    }
}

impl<'a> OpenOptions<'a> {
    /// The model is of one of these families, in place of [`FAMILIES`].
    #[must_use]
    pub fn families(self, families: &'a [&'a dyn Family]) -> Self {
        Self { families, ..self }
    }

    /// Whether tensors that the model does not ask for are told of in the log and otherwise ignored, in
    /// place of [`Error::TensorsUnread`](crate::Error::TensorsUnread). Buffers that older files have
    /// of rotary embeddings are always ignored.
    #[must_use]
    pub fn ignore_extra_tensors(self, ignore: bool) -> Self {
        Self { ignore_extra_tensors: ignore, ..self }
    }

    /// Whether files of weights are mapped (the default), or else read into memory: the latter takes
    /// longer and memory of its own, but a file that another process shortens meanwhile cannot end this one.
    #[must_use]
    pub fn mmap(self, mmap: bool) -> Self {
        Self { mmap, ..self }
    }

    /// Weights that are made up from a seed ([`RandomTensors`](crate::RandomTensors)), in place of the folder's, which
    /// needs no files of them: for measurements. GGUF files, which are of one piece, keep theirs.
    #[must_use]
    pub fn random_weights(self, seed: Option<u32>) -> Self {
        Self { random_weights: seed, ..self }
    }

    /// Opens the weights of a model folder, or of a GGUF file, alone.
    ///
    /// # Errors
    /// Those of [`Weights::open`] or [`Gguf::open`].
    pub fn open_tensors(&self, path: impl AsRef<Path>) -> Result<Box<dyn Tensors>> {
        let path = path.as_ref();
        Ok(match is_gguf(path) {
            true => Box::new(Gguf::open_with(path, self.mmap)?),
            false => Box::new(Weights::open_with(path, self.mmap)?),
        })
    }

    /// Opens a folder.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn open<D: Math>(&self, device: D, folder: impl AsRef<Path>) -> Result<Checkpoint<D>> {
        Checkpoint::open_part(device, folder.as_ref(), self, None)
    }

    /// Opens a folder with one rank's part of the network.
    ///
    /// # Errors
    /// As [`Checkpoint::open_shard`].
    pub fn open_shard<D: Math>(
        &self,
        device: D,
        folder: impl AsRef<Path>,
        shard: Shard<D>,
    ) -> Result<Checkpoint<D>> {
        Checkpoint::open_part(device, folder.as_ref(), self, Some(shard))
    }
}
