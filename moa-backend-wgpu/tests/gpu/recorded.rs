//! Decode steps that are recorded once and launched again.

use moa_backend_wgpu::{
    Cache, Device, Dtype, Error, Matrix, Recording, Result, Step, StepShape, Tensor, WgpuBackend,
    ops,
};
use moa_conformance::Verdict;
use moa_core::{Append, CacheType, ExtendInputs, LayerLayout, Span, SparseAttentionBackend};

use crate::gpu::device;

const QUERY_HEADS: usize = 4;
const KV_HEADS: usize = 2;
const LAYERS: usize = 2;
const VOCABULARY: usize = 200;

fn numbers(n: usize, by: usize) -> Vec<f32> {
    (0..n).map(|i| (i * by % 1009) as f32 / 504.0 - 1.0).collect()
}

fn matrix(device: &Device, rows: usize, cols: usize, by: usize) -> Matrix {
    let bytes: Vec<u8> = numbers(rows * cols, by).iter().flat_map(|x| x.to_le_bytes()).collect();
    Matrix::new(device, &bytes, rows, cols, Dtype::F32).unwrap()
}

/// A model of attention alone.
struct Model {
    device: Device,
    backend: WgpuBackend,
    table: Matrix,
    qkv: [Matrix; 3],
    output: Matrix,
    dim: usize,
    capacity: usize,
}

impl Model {
    fn new(device: &Device, dtype: Dtype, dim: usize, capacity: usize) -> Self {
        let (q, kv) = (QUERY_HEADS * dim, KV_HEADS * dim);
        Self {
            device: device.clone(),
            backend: WgpuBackend::new(device, dtype),
            table: matrix(device, VOCABULARY, q, 331),
            qkv: [(q, 577), (kv, 91), (kv, 373)].map(|(rows, by)| matrix(device, rows, q, by)),
            output: matrix(device, VOCABULARY, q, 211),
            dim,
            capacity,
        }
    }

    fn angles(&self, position: usize) -> impl Iterator<Item = (f32, f32)> {
        (0..self.dim / 2).map(move |i| {
            let (sin, cos) = (position as f32 * 0.9 / (i + 1) as f32).sin_cos();
            (cos, sin)
        })
    }

    /// A cache of a full head and one of a ring, filled with so many tokens.
    fn caches(&self, filled: usize) -> Vec<Cache> {
        let spans = [Span::new(0, self.capacity).unwrap(), Span::new(3, 29).unwrap()];
        let layout = LayerLayout::new(&spans, self.capacity, 0).unwrap();
        let fill = |layer: usize| {
            let mut cache = self.backend.open(&layout, self.dim).unwrap();
            let tensor = |heads: usize, by: usize| {
                let values = numbers(filled * heads * self.dim, by + layer);
                Tensor::new(&self.device, &values, &[filled, heads, self.dim]).unwrap()
            };
            let (q, k, v) = (tensor(QUERY_HEADS, 7), tensor(KV_HEADS, 13), tensor(KV_HEADS, 31));
            if filled > 0 {
                let batch = &mut [Append { cache: &mut cache, tokens: filled }];
                self.backend.extend(batch, &ExtendInputs::new(&q, &k, &v, 0.3)).unwrap();
            }
            cache
        };
        (0..LAYERS).map(fill).collect()
    }

    fn shape(&self) -> StepShape {
        StepShape {
            query_heads: QUERY_HEADS,
            kv_heads: KV_HEADS,
            head_dim: self.dim,
            capacity: self.capacity,
            vocab_size: VOCABULARY,
        }
    }

    fn heads(&self, x: &Tensor) -> Result<[Tensor; 3]> {
        let layers = self.qkv.each_ref().map(|weight| ops::Layer { weight, bias: None });
        let [q, k, v] = ops::linears(x, &layers, Dtype::F32)?.try_into().unwrap();
        let split = |x: Tensor, heads: usize| x.reshape(&[1, heads, self.dim]);
        Ok([split(q, QUERY_HEADS)?, split(k, KV_HEADS)?, split(v, KV_HEADS)?])
    }

    /// A step, launch by launch.
    fn step(&self, token: u32, caches: &mut [Cache]) -> Result<Vec<f32>> {
        let position = caches[0].as_ref().len();
        let (cos, sin): (Vec<f32>, Vec<f32>) = self.angles(position).unzip();
        let half = [1, self.dim / 2];
        let cos = Tensor::new(&self.device, &cos, &half)?;
        let sin = Tensor::new(&self.device, &sin, &half)?;
        let mut x = ops::embed(&self.table, &[token], 0.5)?;
        for (layer, cache) in caches.iter_mut().enumerate() {
            let [mut q, mut k, v] = self.heads(&x)?;
            if layer == 0 {
                q = ops::rope(&q, &cos, &sin, false)?;
                k = ops::rope(&k, &cos, &sin, false)?;
            }
            let batch = &mut [Append { cache, tokens: 1 }];
            let out = self.backend.extend(batch, &ExtendInputs::new(&q, &k, &v, 0.3))?.out;
            x = ops::add(&x, &out.reshape(&[1, QUERY_HEADS * self.dim])?)?;
        }
        ops::linear(&x, &self.output, None)?.to_vec()
    }

    /// The same, of a step that is recorded.
    fn described(&self, step: &Step) -> Result<()> {
        let mut x = step.embed(&self.table, 0.5)?;
        for layer in 0..LAYERS {
            let [q, k, v] = self.heads(&x)?;
            // SAFETY: the caches live, and `run` tells of their lengths.
            let out = unsafe { step.attend(layer, [&q, &k, &v], 0.3, layer == 0) }?;
            x = ops::add(&x, &out.reshape(&[1, QUERY_HEADS * self.dim])?)?;
        }
        step.write_logits(&x, &self.output)?;
        step.find_likeliest();
        Ok(())
    }

    fn run(
        &self,
        step: &Step,
        token: u32,
        caches: &mut [Cache],
        recording: &mut Option<Recording>,
        records: bool,
    ) -> Result<Vec<f32>> {
        let len = caches[0].as_ref().len();
        if !step.bring(token, len, self.angles(len), recording.as_ref())? {
            *recording = None;
        }
        if records && recording.is_none() {
            *recording = step.record(|| self.described(step))?;
            assert!(recording.is_some(), "wgpu records steps");
        }
        match recording {
            // SAFETY: the caches live, with the lengths that were said.
            Some(recording) => unsafe { step.launch(recording) }?,
            None => step.queue(|| self.described(step))?,
        }
        caches.iter_mut().try_for_each(|cache| cache.advance(1))?;
        step.logits().to_vec()
    }
}

fn likeliest(logits: &[f32]) -> Option<u32> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|x| *x == top).map(|at| at as u32)
}

/// Bit for bit, over the first split's end and the wrap of a ring, and after the plain step has gone on with the same caches.
pub(crate) fn a_recorded_step_is_the_same_step() -> Verdict {
    let (device, _alone) = device()?;
    // Heads of whole loads, and not of a power of two of them; from nothing and around the end of a split.
    let cases = [
        (Dtype::F32, 24, 0),
        (Dtype::F16, 40, 250),
        (Dtype::Bf16, 64, 250),
        (Dtype::F16, 128, 1020),
    ];
    for (dtype, dim, filled) in cases {
        let model = Model::new(&device, dtype, dim, filled + 1100);
        let [mut expected, mut own] = [0, 0].map(|_| model.caches(filled));
        let caches: Vec<&Cache> = own.iter().collect();
        let step = Step::new(&device, &caches, model.shape())?.expect("wgpu records steps");
        let mut recording = None;
        let mut token = 5;
        for round in 0..12 {
            let logits = model.step(token, &mut expected)?;
            let got = match round {
                // What is queued between is done before, and what was launched before is done then.
                8 => model.step(token, &mut own)?,
                _ => model.run(&step, token, &mut own, &mut recording, round > 0)?,
            };
            assert!(
                got == logits,
                "{dtype} {dim}, round {round}: {:?} {:?}",
                &got[..4],
                &logits[..4]
            );
            token = likeliest(&logits).unwrap();
            if round != 8 {
                assert_eq!(step.likeliest()?, Some(token));
            }
        }
        // Beyond what was recorded it is recorded anew.
        let mut long = model.caches(filled + 1040);
        let [mut expected] = [model.caches(filled + 1040)];
        drop((recording, step, own));
        let caches: Vec<&Cache> = long.iter().collect();
        let step = Step::new(&device, &caches, model.shape())?.expect("wgpu records steps");
        let mut recording = None;
        for round in 0..3 {
            let logits = model.step(token, &mut expected)?;
            assert!(model.run(&step, token, &mut long, &mut recording, round > 0)? == logits);
            token = likeliest(&logits).unwrap();
        }
    }
    Ok(())
}

/// Caches of narrow types, more steps at once than there are streams for, a token that does not exist; logits that are none.
pub(crate) fn steps_that_are_not_recorded() -> Verdict {
    let (device, _alone) = device()?;
    let model = Model::new(&device, Dtype::F32, 32, 40);
    let caches = model.caches(3);
    let refs: Vec<&Cache> = caches.iter().collect();
    let made = || Step::new(&device, &refs, model.shape());
    let mut steps = Vec::new();
    while let Some(step) = made()? {
        steps.push(step);
        assert!(steps.len() < 100);
    }
    steps.truncate(1);
    let step = &steps[0];
    assert!(made()?.is_some());
    assert!(matches!(step.bring(5, 40, model.angles(40), None), Err(Error::Argument(_))));
    assert!(matches!(step.bring(200, 3, model.angles(3), None), Err(Error::Argument(_))));
    assert!(matches!(step.bring(5, 3, model.angles(3).take(9), None), Err(Error::Argument(_))));
    for (bad, of) in [(f32::NAN, 150), (f32::INFINITY, 1), (f32::NEG_INFINITY, VOCABULARY)] {
        let row: Vec<f32> = (0..VOCABULARY).map(|at| if at < of { bad } else { 0.5 }).collect();
        let bytes: Vec<u8> = row.iter().flat_map(|x| x.to_le_bytes()).collect();
        let weight = Matrix::new(&device, &bytes, VOCABULARY, 1, Dtype::F32).unwrap();
        let ones = matrix(&device, VOCABULARY, 1, 1009);
        step.bring(5, 3, model.angles(3), None)?;
        step.queue(|| {
            step.write_logits(&step.embed(&ones, -1.0)?, &weight)?;
            step.find_likeliest();
            Ok::<(), Error>(())
        })?;
        assert_eq!(step.likeliest()?, None, "{bad}");
    }
    // Halves of heads that are no whole loads.
    let odd = Model::new(&device, Dtype::F32, 20, 40);
    assert!(Step::new(&device, &odd.caches(3).iter().collect::<Vec<_>>(), odd.shape())?.is_none());
    let backend = WgpuBackend::new(&device, CacheType::Int8);
    let layout = LayerLayout::new(&[Span::new(0, 40)?; KV_HEADS], 40, 0)?;
    let narrow = [backend.open(&layout, 32)?, backend.open(&layout, 32)?];
    assert!(Step::new(&device, &narrow.each_ref(), model.shape())?.is_none());
    Ok(())
}
