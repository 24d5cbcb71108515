//! One model on several devices: each has some heads and some inner features of every layer.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use moa_core::{ModelShape, Plan, Sharding};

use crate::checkpoint::safetensors::Tensors;
use crate::decoder::config::ModelConfig;
use crate::decoder::layer::Linear;
use crate::decoder::model::Decoder;
use crate::device::rank::{Brought, Communicator, Shortage, Wait};
use crate::device::{Device, Load, Math};
use crate::{Error, Result, memory};

/// One rank's part of a model that several devices share: which KV heads it owns, and the
/// communicator that sums over ranks.
///
/// Projections to heads and inner features are split by output: a rank computes its own heads and
/// features. Those back to the residual stream are split by input, and give a part of the sum, so that
/// each layer needs two sums over ranks. Norms and embedding are everywhere, and the output matrix is
/// split by rows.
///
/// ```no_run
/// use moa_core::{Plan, Sharding};
/// use moa_models::{
///     Cpu, Engine, EngineOptions, Error, GenerateOptions, Decoder, ModelConfig, Shard, ThreadRank,
///     Weights, on_ranks,
/// };
///
/// let (config, weights) = (ModelConfig::from_file("model")?, Weights::open("model")?);
/// let plan = Plan::load("plan.json")?;
/// let sharding = Sharding::balanced(&plan, 8192, 2)?;
/// // On two GPUs: `NcclRank::group(2)`, and `Cuda::new(rank.rank(), ..)`.
/// let generated = on_ranks(ThreadRank::group(2)?, |rank| {
///     let shard = Shard::new(&sharding, rank)?;
///     let model = Decoder::load_shard(Cpu::default(), config.clone(), &weights, shard)?;
///     let mut engine = Engine::new(model.into(), EngineOptions::default());
///     engine.submit(vec![1, 2, 3], &plan, GenerateOptions::default());
///     engine.complete_all()
/// })?;
/// assert_eq!(generated[0], generated[1]);
/// # Ok::<(), Error>(())
/// ```
pub struct Shard<D: Device> {
    sharding: Sharding,
    communicator: Box<dyn Communicator<D>>,
}

impl<D: Device> std::fmt::Debug for Shard<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Shard({} of {})", self.communicator.rank(), self.communicator.ranks())
    }
}

/// How many weights there are, biases not counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WeightCounts {
    /// Of linear layers, without the output matrix.
    pub(crate) linear: u64,
    /// Outputs of those layers.
    outputs: u64,
    /// Of embedding, output matrix and norms.
    pub(crate) rest: u64,
}

impl WeightCounts {
    fn of(c: &ModelConfig) -> Self {
        let linear = c.linear_parameters();
        Self { linear, outputs: c.linear_outputs(), rest: c.parameters() - linear }
    }

    /// Bytes of linear layers on a device.
    pub(crate) fn linear_bytes<D: Load>(&self, device: &D) -> u64 {
        device.linear_bytes(self.linear, self.outputs)
    }

    /// Bytes of all on a device.
    pub(crate) fn bytes<D: Load>(&self, device: &D) -> u64 {
        device.weight_bytes(self.rest) + self.linear_bytes(device)
    }
}

/// Elements of a row that kernels read at once: parts of the vocabulary begin at their multiples.
const ALIGNED: usize = 8;

impl<D: Device> Shard<D> {
    /// The heads that `sharding` gives to the rank of `communicator`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if `communicator` belongs to a group of another size than `sharding` was
    /// made for.
    pub fn new(sharding: &Sharding, communicator: impl Communicator<D> + 'static) -> Result<Self> {
        let (ranks, got) = (sharding.ranks(), communicator.ranks());
        if ranks != got || communicator.rank() >= ranks {
            let got = format!("rank {} of {got}", communicator.rank());
            return Err(Error::invalid("communicator", format!("one of {ranks} ranks"), got));
        }
        Ok(Self { sharding: sharding.clone(), communicator: Box::new(communicator) })
    }

    pub(crate) fn rank(&self) -> usize {
        self.communicator.rank()
    }

    /// KV heads of a layer that are here.
    pub(crate) fn heads(&self, layer: usize) -> &[usize] {
        self.sharding.heads(layer, self.rank())
    }

    /// [`Communicator::all_reduce`].
    pub(crate) fn all_reduce(&self, device: &D, x: &mut D::Tensor) -> Result<()> {
        self.communicator.all_reduce(device, x)
    }

    /// Whether a step can be captured.
    pub(crate) fn only_launches(&self) -> bool {
        self.communicator.only_launches()
    }

    /// Checks that the model can be split so; the dimensions of what is here.
    pub(crate) fn local_shape(shard: Option<&Self>, c: &ModelConfig) -> Result<ModelShape> {
        let Some(Self { sharding, communicator }) = shard else { return Ok(c.shape()) };
        let (expected, got) = (c.shape(), sharding.shape());
        if expected != got {
            let what = "sharding";
            return Err(moa_core::Error::ShapeMismatch { what, expected, got }.into());
        }
        let ranks = sharding.ranks();
        if !c.intermediate_size.is_multiple_of(ranks) {
            let expected = format!("a divisor of intermediate_size ({})", c.intermediate_size);
            return Err(Error::invalid("ranks", expected, ranks));
        }
        if c.vocab_size < ALIGNED * ranks {
            let expected = format!("at most vocab_size ({}) / {ALIGNED}", c.vocab_size);
            return Err(Error::invalid("ranks", expected, ranks));
        }
        Ok(sharding.rank_shape(communicator.rank()))
    }

    /// Tokens whose logits are computed here.
    pub(crate) fn vocabulary(&self, c: &ModelConfig) -> Range<usize> {
        let groups = c.vocab_size.div_ceil(ALIGNED);
        let start =
            |rank: usize| (groups * rank / self.sharding.ranks() * ALIGNED).min(c.vocab_size);
        start(self.rank())..start(self.rank() + 1)
    }

    /// Inner features of a layer that are here.
    pub(crate) fn inner(shard: Option<&Self>, c: &ModelConfig) -> usize {
        c.intermediate_size / shard.map_or(1, |shard| shard.sharding.ranks())
    }

    /// Weights that are here.
    pub(crate) fn weights(shard: Option<&Self>, c: &ModelConfig) -> WeightCounts {
        let Some(shard) = shard else { return WeightCounts::of(c) };
        let heads = shard.sharding.rank_shape(shard.rank());
        let own = ModelConfig {
            num_attention_heads: heads.query_heads,
            num_key_value_heads: heads.kv_heads,
            intermediate_size: Self::inner(Some(shard), c),
            tie_word_embeddings: true,
            ..c.clone()
        };
        let output = (shard.vocabulary(c).len() * c.hidden_size) as u64;
        let counts = WeightCounts::of(&own);
        WeightCounts { rest: counts.rest + output, ..counts }
    }
}

impl<D: Math> Decoder<D> {
    /// Loads one rank's part of a Hugging Face checkpoint: of split weights it reads its own slices.
    ///
    /// All ranks are then called alike, each on a thread (or in a process) of its own, with the same
    /// plans, tokens and options in the same order; they get the same logits. Plans are those of the
    /// whole model, of which a rank opens caches for its own heads.
    ///
    /// # Errors
    /// [`Error::Core`] with [`ShapeMismatch`](moa_core::Error::ShapeMismatch) if the sharding is
    /// for a model of other dimensions; [`Error::Invalid`] if `intermediate_size` is not a multiple
    /// of the number of ranks, or the vocabulary has fewer than 8 tokens a rank; those of
    /// [`load`](Self::load).
    pub fn load_shard(
        device: D,
        config: ModelConfig,
        weights: &dyn Tensors,
        shard: Shard<D>,
    ) -> Result<Self> {
        Self::load_part(device, config, weights, Some(shard))
    }

    /// The number of devices that share the model; 1 for a whole model.
    pub fn ranks(&self) -> usize {
        self.shard.as_ref().map_or(1, |shard| shard.sharding.ranks())
    }

    /// Checks that all of the model is here.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming `what`, if the model is one rank's part.
    pub(crate) fn check_whole(&self, what: &'static str) -> Result<()> {
        match &self.shard {
            None => Ok(()),
            Some(shard) => Err(Error::invalid(what, "of a whole model", format!("{shard:?}"))),
        }
    }

    /// The part of a plan that is about this rank's heads, as the model can follow it.
    ///
    /// # Errors
    /// [`Error::Core`] with [`ShapeMismatch`](moa_core::Error::ShapeMismatch) if the plan is for a
    /// model of other dimensions.
    pub(crate) fn own_plan<'a>(&self, plan: &'a Plan) -> Result<Cow<'a, Plan>> {
        self.plan_of(plan, self.shard.as_ref().map_or(0, Shard::rank))
    }

    /// The part of a plan that is about the heads of any rank.
    pub(crate) fn plan_of<'a>(&self, plan: &'a Plan, rank: usize) -> Result<Cow<'a, Plan>> {
        let plan = self.config.windowed(plan)?;
        Ok(match &self.shard {
            None => plan,
            Some(shard) => Cow::Owned(shard.sharding.plan(&plan, rank)?),
        })
    }

    /// The residual stream `x` with a branch's end added, that of all ranks; and its `norm`, if one is asked for and
    /// comes with the sum over ranks.
    pub(crate) fn add_branch(
        &self,
        x: D::Tensor,
        y: &D::Tensor,
        end: &Linear<D>,
        norm: Option<&D::Vector>,
    ) -> Result<(D::Tensor, Option<D::Tensor>)> {
        let (device, weight) = (&self.device, &end.weight);
        let bias = end.bias.as_ref();
        let Some(shard) = &self.shard else {
            return Ok((device.linear_add(x, y, weight, bias)?, None));
        };
        // The stream counts once, so the others bring products alone.
        let mut sum = match shard.rank() {
            0 => device.linear_add(x, y, weight, bias)?,
            _ => device.logits(y, weight)?,
        };
        let normed = match norm {
            Some(norm) => shard.communicator.all_reduce_norm(device, &mut sum, norm, self.eps())?,
            None => {
                shard.all_reduce(device, &mut sum)?;
                None
            }
        };
        Ok((sum, normed))
    }

    /// Logits `[rows, vocab]` of normed rows.
    pub(crate) fn output(&self, h: &D::Tensor) -> Result<D::Tensor> {
        let (device, matrix) = (&self.device, self.output_matrix());
        let Some(shard) = &self.shard else { return device.logits(h, matrix) };
        if device.shape(h)[0] == 0 {
            return device.tensor(Vec::new(), &[0, self.config.vocab_size]);
        }
        let columns = shard.vocabulary(&self.config);
        let logits = device.logits_within(h, matrix, columns, self.config.vocab_size)?;
        // Numbers of one rank and zeros of the others: exact, whatever the order.
        self.summed(logits)
    }

    /// A tensor's values, if no rank failed before they were complete.
    pub(crate) fn values(&self, x: D::Tensor) -> Result<Vec<f32>> {
        let values = self.device.values(x).map_err(|error| self.failure(error))?;
        self.check_ranks()?;
        Ok(values)
    }

    /// What `decide` gives on rank 0, on all ranks: for what depends on time, on files or on a user. It runs on rank
    /// 0 alone, for as long as it takes; the value is not copied but shared. Of a whole model it just runs.
    ///
    /// # Errors
    /// That of `decide` on rank 0; [`Error::Rank`] on the others if rank 0 fails, and those of [`Rank::gather`](crate::Rank::gather).
    pub fn agree<T, E>(&self, decide: impl FnOnce() -> Result<T, E>) -> Result<T, E>
    where
        T: Clone + Send + Sync + 'static,
        E: From<Error>,
    {
        let Some(shard) = &self.shard else { return decide() };
        let own: Brought = match shard.rank() {
            0 => Arc::new(decide()?),
            _ => Arc::new(()),
        };
        let all = shard.communicator.gather(own, Wait::First)?;
        let decided = all.first().and_then(|first| first.downcast_ref::<T>());
        let expected = "called alike on all ranks";
        let decided = decided.ok_or_else(|| Error::invalid("agreement", expected, "another call"));
        Ok(decided.inspect_err(|_| shard.communicator.fail())?.clone())
    }

    /// What `work` gives here, where it can be done on all ranks: if the memory of one is too short for it, it is so for
    /// all, and what the others got is given back. Of a whole model it just runs.
    ///
    /// # Errors
    /// That of `work`, which of several ranks is [`Error::RankOutOfMemory`] on all of them where the memory of one is too
    /// short; those of [`Rank::gather`](crate::Rank::gather).
    pub fn together<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some(shard) = &self.shard else { return work() };
        match work() {
            Err(error) if !error.is_of_request() => Err(self.failure(error)),
            // What is wrong with a request is so on all ranks.
            own if shard.communicator.meets() => {
                shard.communicator.gather(Arc::new(()), Wait::Step).and(own)
            }
            own => own,
        }
    }

    /// Waits until all ranks have done their part of a step.
    ///
    /// # Errors
    /// [`Error::RankOutOfMemory`] if one had no memory for it, and those of [`Rank::gather`](crate::Rank::gather).
    pub(crate) fn all_done(&self) -> Result<()> {
        self.together(|| Ok(()))
    }

    /// Those of several things that are so on all ranks, each of which has as many. Of a whole model they are as they are.
    ///
    /// # Errors
    /// [`Error::Invalid`] if another rank has more or fewer, and those of [`Rank::gather`](crate::Rank::gather).
    pub fn on_all_ranks(&self, own: Vec<bool>) -> Result<Vec<bool>> {
        let Some(shard) = &self.shard else { return Ok(own) };
        let mut so = own.clone();
        for part in &*shard.communicator.gather(Arc::new(own), Wait::Step)? {
            let part = part.downcast_ref::<Vec<bool>>().filter(|part| part.len() == so.len());
            let Some(part) = part else {
                shard.communicator.fail();
                let expected = format!("{} of each", so.len());
                return Err(Error::invalid("what ranks agree on", expected, "something else"));
            };
            so.iter_mut().zip(part).for_each(|(so, own)| *so &= own);
        }
        Ok(so)
    }

    /// Waits until the ranks that share the model have loaded their parts too, which may take minutes. Without this
    /// the first sum waits for them, and not for long.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank failed, and those of [`Rank::gather`](crate::Rank::gather).
    pub fn all_loaded(&self) -> Result<()> {
        let Some(shard) = &self.shard else { return Ok(()) };
        shard.communicator.gather(Arc::new(()), Wait::Load).map(drop)
    }

    /// Whether files and messages are this rank's to write: that of rank 0, and of a whole model.
    pub fn is_first(&self) -> bool {
        self.shard.as_ref().is_none_or(|shard| shard.rank() == 0)
    }

    /// What each KV head of a layer has, in their order, from what the heads of this rank have: `len` numbers each.
    pub(crate) fn all_heads(&self, layer: usize, own: Vec<f64>, len: usize) -> Result<Vec<f64>> {
        let Some(shard) = &self.shard else { return Ok(own) };
        let all = shard.communicator.gather(Arc::new(own), Wait::Step)?;
        let heads = self.config.num_key_value_heads;
        let mut whole = memory::filled(heads * len, f64::NAN, "numbers of all heads")?;
        for (rank, part) in all.iter().enumerate() {
            let places = shard.sharding.heads(layer, rank);
            let part = part.downcast_ref::<Vec<f64>>().filter(|p| p.len() == places.len() * len);
            let Some(part) = part else {
                let expected = format!("{len} numbers of each of {} heads", places.len());
                return Err(Error::invalid("numbers of a rank", expected, "others"));
            };
            for (head, numbers) in places.iter().zip(part.chunks(len.max(1))) {
                whole[head * len..][..len].copy_from_slice(numbers);
            }
        }
        Ok(whole)
    }

    /// Makes a part of a sum the sum of all ranks.
    pub(crate) fn summed(&self, mut x: D::Tensor) -> Result<D::Tensor> {
        if let Some(shard) = &self.shard {
            shard.all_reduce(&self.device, &mut x)?;
        }
        Ok(x)
    }

    /// Checks that no rank has failed, so that what the device has computed so far is whole.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank failed.
    pub(crate) fn check_ranks(&self) -> Result<()> {
        match self.shard.as_ref().and_then(|shard| shard.communicator.reason()) {
            None => Ok(()),
            Some(reason) => Err(reason),
        }
    }

    /// Tells the other ranks that a step failed here, and what it failed of: a device that gives up a wait does not
    /// know why. Where memory was too short, they are told at their next meeting, which may be a sum of the step, and all
    /// go on from there.
    pub(crate) fn failure(&self, error: Error) -> Error {
        let Some(shard) = &self.shard else { return error };
        let communicator = &shard.communicator;
        match error {
            Error::RankOutOfMemory { .. } => return error,
            Error::OutOfMemory { .. } if self.ranks() == 1 => return error,
            Error::OutOfMemory { .. } if communicator.meets() => {
                let shortage = Arc::new(Shortage(error.to_string()));
                let met = communicator.gather(shortage, Wait::Step);
                if let Err(error @ Error::RankOutOfMemory { .. }) = met {
                    return error;
                }
            }
            _ => {}
        }
        let reason = communicator.reason();
        communicator.fail();
        match reason {
            // That it failed itself is nothing new.
            Some(Error::Rank { rank }) if rank == shard.rank() => error,
            Some(reason) => reason,
            None => error,
        }
    }

    /// [`failure`](Self::failure) of a step that is recorded, which other ranks may have launched whole: they cannot go on
    /// without this one, whatever it failed of.
    pub(crate) fn recorded_failure(&self, error: Error) -> Error {
        match error {
            Error::OutOfMemory { .. } if self.shard.is_some() => {
                self.failure(Error::Backend(error.into()))
            }
            error => self.failure(error),
        }
    }

    /// Tells other ranks that a step begins here.
    pub(crate) fn begins(&self) {
        if let Some(shard) = &self.shard {
            shard.communicator.begins();
        }
    }

    /// The least of a number that each rank has.
    pub(crate) fn least(&self, own: usize) -> Result<usize> {
        let Some(shard) = &self.shard else { return Ok(own) };
        // Ranks can only add: each writes its own place. f32 holds numbers up to 2^24.
        let mut all = vec![0.0; shard.sharding.ranks()];
        all[shard.rank()] = own.min(1 << 24) as f32;
        let mut all = self.device.tensor(all, &[shard.sharding.ranks()])?;
        shard.all_reduce(&self.device, &mut all)?;
        let all = self.values(all)?;
        Ok(all.into_iter().map(|n| n as usize).min().unwrap_or(own))
    }
}
