use std::time::Instant;

use crate::Result;
use crate::decoder::logits::LogitRows;
use crate::device::Math;
use crate::engine::choice::Choice;
use crate::engine::running::Running;
use crate::engine::serve::Engine;

impl<D: Math> Engine<D> {
    /// One step of the running requests: the whole loop of generation.
    pub(super) fn advance(&mut self) -> Result<()> {
        if self.running.is_empty() {
            return Ok(());
        }
        let begin = Instant::now();
        let reads = self.running.iter().any(Running::is_reading);
        let step = if reads { self.read() } else { self.decode() };
        if let Err(error) = step {
            self.fail(&error);
            return Err(error);
        }
        let time = if reads { &mut self.usage.prefill } else { &mut self.usage.decode };
        *time += begin.elapsed();
        Ok(())
    }

    /// Reads a stretch of unread prompts, and the last token of the others.
    fn read(&mut self) -> Result<()> {
        let mut left = self.options.prefill_chunk;
        let part = |run: &Running| {
            let part = run.part(left).to_vec();
            if run.is_reading() {
                left -= part.len();
            }
            part
        };
        let parts: Vec<Vec<u32>> = self.running.iter().map(part).collect();
        let (mut batch, mut tokens) = (Vec::new(), Vec::new());
        for (sequence, part) in self.batch.apart().iter_mut().zip(&parts) {
            // A prompt may have to wait for those before it.
            if !part.is_empty() {
                batch.push(sequence);
                tokens.push(part.as_slice());
            }
        }
        let (mut rows, mut end) = (Vec::new(), 0);
        for (run, part) in self.running.iter().zip(&parts) {
            end += part.len();
            if run.is_read_after(part.len()) {
                rows.push(end - 1);
            }
        }
        let logits = self.model.forward(&mut batch, &tokens, LogitRows::Rows(&rows))?;
        // Without rows the device need not be waited for.
        let mut logits = match rows.is_empty() {
            true => Vec::new(),
            false => self.model.values(logits)?,
        };
        let mut rows = logits.chunks_mut(self.model.config().vocab_size);
        let took_part = self.running.iter_mut().zip(&parts).filter(|(_, part)| !part.is_empty());
        for (run, part) in took_part {
            if run.is_reading() {
                self.usage.prompt_tokens += part.len();
            }
            run.took_in(part.len(), &mut self.events);
            if !run.is_reading()
                && let Some(row) = rows.next()
            {
                run.choose(row, &mut self.events);
            }
        }
        Ok(())
    }

    /// A token for every request, chosen where it is done fastest.
    fn decode(&mut self) -> Result<()> {
        let (model, events) = (&*self.model, &mut self.events);
        let tokens: Vec<u32> = self.running.iter().map(Running::last).collect();
        let session = self.batch.session(model)?;
        let options = self.running.iter().map(Running::sampling);
        match Choice::of(options, session.can_sample()) {
            Choice::Host => {
                let mut logits = session.step(model, &tokens)?;
                let rows = logits.chunks_mut(model.config().vocab_size);
                for (run, row) in self.running.iter_mut().zip(rows) {
                    run.took_in(1, events);
                    run.choose(row, events);
                }
            }
            choice => {
                let chosen = match choice {
                    Choice::Drawn(sampling) => {
                        let sampling = sampling.clone();
                        let units: Vec<f64> = self.running.iter_mut().map(Running::unit).collect();
                        session.step_sampled(model, &tokens, &sampling, &units)?
                    }
                    _ => session.step_greedy(model, &tokens)?,
                };
                for (run, token) in self.running.iter_mut().zip(chosen) {
                    run.took_in(1, events);
                    run.accept(token, events);
                }
            }
        }
        self.usage.decoded_tokens += tokens.len();
        Ok(())
    }
}
