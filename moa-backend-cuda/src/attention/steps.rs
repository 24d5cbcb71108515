use cudarc::driver::CudaSlice;

use super::step::{Batch, Prepared, Step, Tensors};
use crate::kernels::tables::DevicePointer;
use crate::memory::{Staging, Workspace, address};
use crate::{Cache, Device, Error, RawStream, Result};

/// The attention of all layers of a decode step, for a CUDA graph that outlives its sequences: which they are, its tables
/// alone say.
///
/// There may be more places than sequences; those that are vacant write nothing. All tables lie in one piece of device
/// memory, so that other sequences cost one upload.
#[derive(Debug)]
pub struct Steps {
    device: Device,
    layers: Vec<Step>,
    /// The layer before each that is cut alike and has its tables but one.
    alike: Vec<Option<usize>>,
    shape: Shape,
    tables: CudaSlice<u8>,
    host: Vec<u8>,
    staging: Staging,
    workspace: Workspace,
}

/// What stays the same whatever the sequences are.
#[derive(Clone, Copy, Debug)]
struct Shape {
    /// New tokens of each.
    tokens: usize,
    query_heads: usize,
    places: usize,
}

/// Items that the launch of a split kernel has for so many with work: a quarter more, for sequences that need more than
/// those before, whose blocks otherwise leave at once.
fn room(items: usize) -> usize {
    items.saturating_add(items / 4).next_multiple_of(32)
}

/// Most items of a launch of which so many have work: more empty blocks would take time.
fn most_room(items: usize) -> usize {
    items.saturating_mul(2).saturating_add(256)
}

impl Shape {
    /// A step for each layer, with tables that are added to `host`; `None` as [`Step::plan`]. Layers are cut as those that
    /// `alike` says, or `None` if they are not alike. `room` is told the layer, the launch and its items.
    fn plan(
        self,
        device: &Device,
        layers: &[Vec<&Cache>],
        alike: &[Option<usize>],
        room: impl Fn(usize, usize, usize) -> usize,
        host: &mut Vec<u8>,
    ) -> Result<Option<Vec<(Step, Prepared)>>> {
        let tokens = vec![self.tokens; layers.first().map_or(0, Vec::len)];
        let vacant = self.places - tokens.len();
        host.clear();
        let mut planned: Vec<(Step, Prepared)> = Vec::with_capacity(layers.len());
        for (layer, caches) in layers.iter().enumerate() {
            let Self { query_heads, .. } = self;
            let batch = Batch { caches, tokens: &tokens, query_heads, grows: true, softcap: None };
            let mut step = Step::new(device);
            let prepared = match alike[layer] {
                Some(other) if !are_alike(caches, &layers[other]) => return Ok(None),
                Some(other) => {
                    let (other, prepared) = &planned[other];
                    step.plan_like(other, prepared, &batch, host)
                }
                None => {
                    let room = |launch, items| room(layer, launch, items);
                    match step.plan(&batch, vacant, Some(&room), host)? {
                        Some(prepared) => prepared,
                        None => return Ok(None),
                    }
                }
            };
            planned.push((step, prepared));
        }
        Ok(Some(planned))
    }
}

/// Whether caches of two layers are of one device, laid out alike, and hold as many tokens.
fn are_alike(caches: &[&Cache], others: &[&Cache]) -> bool {
    let is_alike = |(cache, other): (&&Cache, &&Cache)| {
        let (own, others) = (cache.geometry(), other.geometry());
        cache.as_ref().len() == other.as_ref().len()
            && cache.device().is_same(other.device())
            && cache.variant() == other.variant()
            && own.rows == others.rows
            && own.narrow_rows == others.narrow_rows
            && own.layout == others.layout
    };
    caches.len() == others.len() && caches.iter().zip(others).all(is_alike)
}

impl Steps {
    /// Plans a step of `tokens` new tokens for each sequence and uploads its tables in the order of `stream`. `layers` are
    /// the caches of each layer, one per sequence, which may grow to their whole capacity. There are `places` for
    /// sequences, or only as many as sequences where narrow heads are copied.
    ///
    /// # Errors
    /// As [`Step::prepare`]; [`Error::Argument`] unless there is a layer, and a place for each sequence.
    ///
    /// # Safety
    /// `stream` is a stream of the device's primary context and not being captured.
    pub unsafe fn new(
        device: &Device,
        layers: &[Vec<&Cache>],
        [tokens, query_heads, places]: [usize; 3],
        stream: RawStream,
    ) -> Result<Self> {
        const OP: &str = "Steps::new";
        let sequences = layers.first().map_or(0, Vec::len);
        if layers.is_empty() || places < sequences {
            let got = format!("{} layers, {places} places", layers.len());
            let expected = format!("at least 1 layer and {sequences} places");
            return Err(Error::argument(OP, "layers", expected, got));
        }
        let first_like = |(layer, caches): (usize, &Vec<&Cache>)| {
            (0..layer).find(|other| are_alike(caches, &layers[*other]))
        };
        let alike: Vec<Option<usize>> = layers.iter().enumerate().map(first_like).collect();
        let mut host = Vec::new();
        let mut planned = None;
        for places in [places, sequences] {
            let shape = Shape { tokens, query_heads, places };
            let steps = shape.plan(device, layers, &alike, |_, _, items| room(items), &mut host)?;
            planned = steps.map(|steps| (shape, steps));
            if planned.is_some() {
                break;
            }
        }
        let missing = || Error::argument(OP, "layers", "a batch without vacant places", "another");
        let (shape, planned) = planned.ok_or_else(missing)?;
        let mut workspace = Workspace::new(device);
        let tables = device.alloc("tables", host.len())?;
        let mut staging = Staging::new(device);
        // SAFETY: as the caller promises; the tables have room for what is uploaded.
        unsafe {
            for (step, prepared) in &planned {
                workspace.reserve(step.schedule(), prepared.head_dim(), stream)?;
            }
            staging.upload(&host, address(&tables), stream)?;
        }
        let layers = accepted(planned, address(&tables)).collect();
        Ok(Self { device: device.clone(), layers, alike, shape, tables, host, staging, workspace })
    }

    /// Has other sequences take the places, if what is launched is the same for them: they need no more work items than
    /// there are, nor so few that most would be empty. Returns whether it is; otherwise nothing changes.
    ///
    /// # Errors
    /// As [`Step::prepare`].
    ///
    /// # Safety
    /// As [`new`](Self::new); what was launched before is on the same stream.
    pub unsafe fn replace(&mut self, layers: &[Vec<&Cache>], stream: RawStream) -> Result<bool> {
        let Self { device, layers: own, alike, shape, tables, host, staging, .. } = self;
        let sequences = layers.first().map_or(0, Vec::len);
        if layers.len() != own.len() || !(1..=shape.places).contains(&sequences) {
            return Ok(false);
        }
        let room = |layer: usize, launch, items| match own[layer].items_of(launch) {
            most if most <= most_room(items) => most,
            _ => 0,
        };
        let Some(planned) = shape.plan(device, layers, alike, room, host)? else {
            return Ok(false);
        };
        let others: Vec<Step> = accepted(planned, address(tables)).collect();
        if !own.iter().zip(&others).all(|(own, other)| own.launches_like(other)) {
            return Ok(false);
        }
        // SAFETY: as the caller promises; tables at the same addresses are as long as those before.
        unsafe { staging.upload(host, address(tables), stream) }?;
        own.iter_mut().zip(others).for_each(|(own, other)| own.take_over(other));
        Ok(true)
    }

    /// Launches the attention of a layer, as [`Step::run`]. May be captured.
    ///
    /// # Errors
    /// As [`Step::run`]; [`Error::Argument`] if there is no such layer.
    ///
    /// # Safety
    /// As [`Step::run`], for the sequences that took the places last, with tensors of rows for all places.
    pub unsafe fn run(&self, layer: usize, tensors: &Tensors, stream: RawStream) -> Result<()> {
        let all = self.layers.len();
        let missing = || Error::argument("Steps::run", "layer", format!("below {all}"), layer);
        let step = self.layers.get(layer).ok_or_else(missing)?;
        // SAFETY: as the caller promises.
        unsafe { step.run(&self.workspace, tensors, stream) }
    }

    /// Reads the lengths that sequences have before a step at this address, one i32 for each in [`order`](Self::order).
    ///
    /// # Errors
    /// As [`Step::read_lengths_at`].
    ///
    /// # Safety
    /// As [`Step::read_lengths_at`].
    pub unsafe fn read_lengths_at(&mut self, lengths: DevicePointer) -> Result<()> {
        for (index, layer) in self.layers.iter_mut().enumerate() {
            let first = (index * self.shape.places * size_of::<i32>()) as DevicePointer;
            // SAFETY: as the caller promises.
            unsafe { layer.read_lengths_at(lengths + first) }?;
        }
        Ok(())
    }

    /// The sequences at the places of each layer, one layer after the other; those that there are not have no length.
    pub fn order(&self) -> impl Iterator<Item = usize> + '_ {
        self.layers.iter().flat_map(Step::order).copied()
    }

    /// Places for sequences.
    pub fn places(&self) -> usize {
        self.shape.places
    }

    /// Bytes of device memory held.
    pub fn bytes(&self) -> u64 {
        self.tables.num_bytes() as u64 + self.workspace.bytes()
    }
}

/// Steps with their tables from `base` on.
fn accepted(planned: Vec<(Step, Prepared)>, base: DevicePointer) -> impl Iterator<Item = Step> {
    planned.into_iter().map(move |(mut step, prepared)| {
        step.accept(prepared, base);
        step
    })
}
