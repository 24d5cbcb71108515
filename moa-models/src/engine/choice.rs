use crate::Result;
use crate::decoder::model::Decoder;
use crate::decoder::session::drawn_of;
use crate::device::{Draw, Math};
use crate::engine::request::Event;
use crate::engine::running::Running;
use std::collections::VecDeque;

/// How a device chooses tokens from rows of logits, each as its request asks for, and which rows it leaves to the host.
#[derive(Debug, Default)]
pub(crate) struct Choices {
    /// One a row.
    pub(crate) draws: Vec<Draw>,
    /// Random numbers, likewise.
    pub(crate) units: Vec<f64>,
    /// Rows of requests that look at the logits themselves.
    by_host: Vec<usize>,
}

/// What stands for a row that the host chooses from.
const LIKELIEST: Draw = Draw { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 };

impl Choices {
    /// A row for each of some requests, which take their next random numbers for it.
    pub(crate) fn of<'a>(running: impl IntoIterator<Item = &'a mut Running>) -> Self {
        let mut choices = Self::default();
        for run in running {
            let draw = run.draw();
            choices.push(draw, || run.unit());
        }
        choices
    }

    /// A row that is drawn from so, or by the host.
    pub(crate) fn push(&mut self, draw: Option<Draw>, unit: impl FnOnce() -> f64) {
        let is_drawn = draw.is_some_and(|draw| draw.temperature != 0.0);
        if draw.is_none() {
            self.by_host.push(self.draws.len());
        }
        self.draws.push(draw.unwrap_or(LIKELIEST));
        self.units.push(if is_drawn { unit() } else { 0.0 });
    }

    /// The tokens that a device has chosen, with the logits of the other rows.
    pub(crate) fn with<D: Math>(
        self,
        model: &Decoder<D>,
        logits: D::Tensor,
        tokens: Vec<Option<u32>>,
    ) -> Result<Chosen> {
        let by_host = self.by_host;
        let logits = match by_host.len() {
            0 => Vec::new(),
            all if all == self.draws.len() => model.values(logits)?,
            _ => {
                let rows = model.device().rows(&logits, &by_host);
                model.values(rows.map_err(|error| model.failure(error))?)?
            }
        };
        Ok(Chosen { tokens, by_host, logits, vocab: model.config().vocab_size })
    }
}

/// Tokens after rows of logits, or what the host chooses them from.
#[derive(Debug)]
pub(crate) struct Chosen {
    tokens: Vec<Option<u32>>,
    by_host: Vec<usize>,
    /// Of the host's rows.
    logits: Vec<f32>,
    vocab: usize,
}

impl Chosen {
    /// Tokens that a device has chosen, all of them.
    pub(crate) fn by_device(tokens: Vec<Option<u32>>) -> Self {
        Self { tokens, by_host: Vec::new(), logits: Vec::new(), vocab: 0 }
    }

    /// Chooses after all rows of logits, on the device if it can.
    pub(crate) fn from_logits<'a, D: Math>(
        model: &Decoder<D>,
        logits: D::Tensor,
        running: impl IntoIterator<Item = &'a mut Running>,
    ) -> Result<Self> {
        if model.device().can_sample() {
            let choices = Choices::of(running);
            let tokens = drawn_of(model, &logits, &choices.draws, &choices.units)?;
            return choices.with(model, logits, tokens);
        }
        Ok(Self::by_host(model, model.values(logits)?))
    }

    /// Logits from which the host chooses after all rows.
    pub(crate) fn by_host<D: Math>(model: &Decoder<D>, logits: Vec<f32>) -> Self {
        let vocab = model.config().vocab_size;
        let rows = logits.len().checked_div(vocab).unwrap_or(0);
        Self { tokens: Vec::new(), by_host: (0..rows).collect(), logits, vocab }
    }

    /// Whether the device has chosen after this row.
    pub(crate) fn is_by_device(&self, row: usize) -> bool {
        self.by_host.binary_search(&row).is_err()
    }

    /// Tells a request its token after a row.
    pub(crate) fn tell(&mut self, row: usize, run: &mut Running, events: &mut VecDeque<Event>) {
        match self.by_host.binary_search(&row) {
            Ok(at) => run.choose(&mut self.logits[at * self.vocab..][..self.vocab], events),
            Err(_) => run.accept(self.tokens[row], events),
        }
    }

    /// Tells requests the tokens after their rows; what they say of it may come [later](Told::say).
    pub(crate) fn note(mut self, running: &mut [Running]) -> Told {
        let mut said = Vec::new();
        for (row, run) in running.iter_mut().enumerate() {
            match self.tokens.get(row) {
                Some(token) if !run.has_stops() && self.is_by_device(row) => run.note(*token),
                // They say it now, as it may end them.
                _ => {
                    let mut events = VecDeque::new();
                    self.tell(row, run, &mut events);
                    said.push((row, events));
                }
            }
        }
        Told { said }
    }
}

/// Tokens that requests know of.
#[derive(Debug)]
pub(crate) struct Told {
    /// What some have said already.
    said: Vec<(usize, VecDeque<Event>)>,
}

impl Told {
    /// What all say, one after the other.
    pub(crate) fn say(self, running: &mut [Running], events: &mut VecDeque<Event>) {
        let mut said = self.said.into_iter().peekable();
        for (row, run) in running.iter_mut().enumerate() {
            match said.next_if(|(of, _)| *of == row) {
                Some((_, mut own)) => events.append(&mut own),
                None => run.tell(events),
            }
        }
    }
}
