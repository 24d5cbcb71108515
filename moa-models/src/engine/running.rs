use std::collections::VecDeque;

use crate::checkpoint::tokenizer::{TokenStream, Tokenizer};
use crate::device::Draw;
use crate::engine::constraint::Constraint;
use crate::engine::logprobs::{Logprobs, TokenLogprobs};
use crate::engine::request::{Completion, Event, Finish, GenerateOptions, RequestId};
use crate::engine::sampling::Sampler;
use crate::engine::speculate::{Draft, Drafter};
use crate::engine::stop::StopStrings;
use crate::{Error, Result};

/// A request with what is known of it so far, but for its sequence.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) id: RequestId,
    /// Its sequence is the caller's and goes back to it.
    pub(crate) is_resumed: bool,
    sampler: Sampler,
    pub(crate) constraint: Option<Box<dyn Constraint>>,
    logprobs: Option<usize>,
    /// Whether tokens of the prompt are told with theirs.
    tells_prompt: bool,
    /// Positions of the prompt at which a step ends.
    prefill_stops: Vec<usize>,
    max_new_tokens: usize,
    min_new_tokens: usize,
    eos_token_ids: Vec<u32>,
    stop_token_ids: Vec<u32>,
    text: Option<Text>,
    /// Prompt and new tokens.
    history: Vec<u32>,
    prompt_len: usize,
    /// Prompt tokens that are in the sequence.
    pub(crate) read: usize,
    /// Tokens that the sequence has room for.
    pub(crate) room: usize,
    /// Tokens of the sequence before the prompt, which nobody told.
    pub(crate) before: usize,
    ended: Option<Result<Finish>>,
    untold: Option<Untold>,
    drafter: Drafter,
}

/// What was taken and not told yet.
#[derive(Debug)]
enum Untold {
    Token(u32, Option<TokenLogprobs>),
    /// Text that a stop token leaves.
    Rest,
}

/// How long answers are, by those that have ended.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Answers {
    /// Tokens that requests got of late, on average.
    mean: Option<f64>,
}

/// The part of the tokens that a request may still get which it is expected to get, before any has ended.
const EXPECTED: f64 = 0.5;

impl Answers {
    /// A request has ended.
    pub(crate) fn learn(&mut self, run: &Running) {
        let own = run.new_tokens() as f64;
        self.mean = Some(self.mean.map_or(own, |mean| mean + (own - mean) / 4.0));
    }

    /// Tokens that a request is expected to get yet.
    pub(crate) fn left(&self, run: &Running) -> f64 {
        let (left, done) = (run.left() as f64, run.new_tokens() as f64);
        self.mean.map_or(EXPECTED * left, |mean| (mean - done).clamp(0.0, left))
    }
}

/// Tokens as text that comes in pieces.
#[derive(Debug)]
struct Text {
    stream: TokenStream,
    stops: StopStrings,
    whole: String,
}

impl Running {
    /// A request without a sequence. Its text, where there is a tokenizer, follows on the prompt's or
    /// begins anew.
    pub(crate) fn new(
        id: RequestId,
        prompt: Vec<u32>,
        options: GenerateOptions,
        eos_token_ids: &[u32],
        text: Option<(&Tokenizer, bool)>,
    ) -> Result<Self> {
        let stops = StopStrings::new(&options.stop)?;
        let mut stop_token_ids = options.stop_token_ids;
        let text = match text {
            None if options.stop.is_empty() => None,
            None => return Err(Error::invalid("stop strings", "none without a tokenizer", "some")),
            Some((tokenizer, continues)) => {
                // No text has a special token in it.
                let ids = options.stop.iter().filter_map(|stop| tokenizer.special_token_id(stop));
                stop_token_ids.extend(ids);
                let stream = match continues {
                    true => tokenizer.stream_after(&prompt)?,
                    false => tokenizer.stream(),
                };
                Some(Text { stream, stops, whole: String::new() })
            }
        };
        Ok(Self {
            id,
            is_resumed: false,
            sampler: Sampler::new(options.sampling)?,
            constraint: None,
            logprobs: options.logprobs,
            tells_prompt: options.prompt_logprobs,
            prefill_stops: options.prefill_stops,
            max_new_tokens: options.max_new_tokens,
            min_new_tokens: options.min_new_tokens,
            eos_token_ids: options.eos_token_ids.unwrap_or_else(|| eos_token_ids.to_vec()),
            stop_token_ids,
            text,
            prompt_len: prompt.len(),
            history: prompt,
            read: 0,
            room: 0,
            before: 0,
            ended: None,
            untold: None,
            drafter: Drafter::default(),
        })
    }

    pub(crate) fn is_reading(&self) -> bool {
        self.read < self.prompt_len
    }

    /// Whether a step that takes in so many tokens, if any, ends in one that another follows.
    pub(crate) fn is_read_after(&self, tokens: usize) -> bool {
        tokens > 0 && self.read + tokens >= self.prompt_len
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.ended.is_some()
    }

    /// How a device chooses its tokens; `None` where the host must see the logits.
    pub(crate) fn draw(&self) -> Option<Draw> {
        let options = self.sampler.options();
        let sees = self.logprobs.is_some()
            || self.constraint.is_some()
            || self.must_go_on()
            || !options.is_plain();
        (!sees).then(|| options.into())
    }

    /// The next random number of this request's own.
    pub(crate) fn unit(&mut self) -> f64 {
        self.sampler.unit()
    }

    /// The token that a decode step takes in.
    pub(crate) fn last(&self) -> u32 {
        self.history[self.history.len() - 1]
    }

    /// Tokens of the prompt that one step may read: up to its end, or up to the next stop with at least `rows`
    /// tokens on both sides.
    fn readable(&self, rows: usize) -> usize {
        let is_far = |stop: &usize| *stop >= self.read + rows && *stop + rows <= self.prompt_len;
        let stops = self.prefill_stops.iter().copied().filter(is_far);
        stops.min().unwrap_or(self.prompt_len) - self.read
    }

    /// How many tokens of the prompt a step reads that may read `most`: at least `rows`, and leaving as many,
    /// unless it reads all; else none.
    pub(crate) fn stretch(&self, most: usize, rows: usize) -> usize {
        let readable = self.readable(rows);
        match readable.saturating_sub(rows).min(most) {
            _ if most >= readable => readable,
            stretch if stretch >= rows => stretch,
            _ => 0,
        }
    }

    /// Tokens that it was continued with.
    pub(crate) fn new_tokens(&self) -> usize {
        self.history.len() - self.prompt_len
    }

    /// Whether the next token may not end it.
    fn must_go_on(&self) -> bool {
        self.new_tokens() < self.min_new_tokens
    }

    /// Tokens that it may still be continued with.
    pub(crate) fn left(&self) -> usize {
        self.max_new_tokens.saturating_sub(self.new_tokens()).min(self.room)
    }

    /// A guess of what follows, of at most so many tokens.
    pub(crate) fn draft(&self, most: usize) -> Draft {
        self.drafter.draft(&self.history, most.min(self.left().saturating_sub(1)))
    }

    /// Prompt and new tokens.
    pub(crate) fn history(&self) -> &[u32] {
        &self.history
    }

    /// Chooses as this request will, among other logits: `guesses` stand for what it chooses before.
    pub(crate) fn guess(
        &self,
        sampler: &mut Sampler,
        guesses: &[u32],
        logits: &mut [f32],
    ) -> Result<u32> {
        match sampler.options().is_plain() {
            true => sampler.sample(logits, &[]),
            false => {
                let past = [&self.history, guesses].concat();
                sampler.sample_after(logits, &past, self.prompt_len)
            }
        }
    }

    /// A sampler that makes this request's next choices.
    pub(crate) fn sampler(&self) -> Sampler {
        self.sampler.fork()
    }

    /// How likely another model's next guess is right, if it has made some.
    pub(crate) fn rate_of_model(&self) -> Option<f64> {
        self.drafter.rate_of_model()
    }

    /// Learns from the token that was chosen where this draft was not checked.
    pub(crate) fn compare(&mut self, draft: &Draft) {
        if let Some(first) = draft.tokens.first() {
            let is_right = !self.has_ended() && self.last() == *first;
            self.drafter.learn(draft, usize::from(is_right), !is_right);
        }
    }

    /// Takes in the last token and those guesses that are what `choose` chooses after each token. Returns how many
    /// guesses were right.
    pub(crate) fn check(
        &mut self,
        draft: &Draft,
        checked: usize,
        mut choose: impl FnMut(&mut Self, usize, &mut VecDeque<Event>),
        events: &mut VecDeque<Event>,
    ) -> usize {
        let mut right = 0;
        for at in 0..=checked {
            self.took_in(1, events);
            choose(self, at, events);
            let guess = draft.tokens.get(at).filter(|_| at < checked);
            if guess.is_none() || self.has_ended() {
                return right;
            }
            if guess != Some(&self.last()) {
                self.drafter.learn(draft, right, true);
                return right;
            }
            right += 1;
            if right == checked {
                self.drafter.learn(draft, right, false);
            }
        }
        right
    }

    /// Tokens of the prompt that are not read.
    pub(crate) fn unread(&self) -> usize {
        self.prompt_len - self.read.min(self.prompt_len)
    }

    /// What the next step takes in: `tokens` tokens of an unread prompt, else the last token.
    pub(crate) fn part(&self, tokens: usize) -> &[u32] {
        match self.is_reading() {
            true => &self.history[self.read..self.read + tokens],
            false => &self.history[self.history.len() - 1..],
        }
    }

    /// How many of the likeliest tokens are told with those of the prompt, while it is read and if they are told.
    pub(crate) fn prompt_logprobs(&self) -> Option<usize> {
        self.logprobs.filter(|_| self.tells_prompt && self.is_reading())
    }

    /// Tells the tokens of the prompt that a step of `tokens` reads or comes to, of which those after the first have logits.
    pub(crate) fn tell_prompt(
        &self,
        tokens: usize,
        logits: &mut impl Iterator<Item = Logprobs>,
        events: &mut VecDeque<Event>,
    ) {
        let id = self.id;
        if self.before + self.read == 0 {
            events.push_back(Event::PromptToken { id, token: self.history[0], logprobs: None });
        }
        let told = &self.history[self.read + 1..self.prompt_len.min(self.read + tokens + 1)];
        for (token, logprobs) in told.iter().zip(logits) {
            let logprobs = Some(logprobs.of_choice(*token));
            events.push_back(Event::PromptToken { id, token: *token, logprobs });
        }
    }

    /// A step has taken in a [`part`](Self::part) of this length.
    pub(crate) fn took_in(&mut self, tokens: usize, events: &mut VecDeque<Event>) {
        self.room -= tokens;
        if self.is_reading() {
            self.read += tokens;
            let (done, total) = (self.read, self.prompt_len);
            events.push_back(Event::Prefill { id: self.id, done, total });
        }
    }

    /// Chooses the next token from the logits of a step.
    pub(crate) fn choose(&mut self, logits: &mut [f32], events: &mut VecDeque<Event>) {
        if self.max_new_tokens == 0 {
            self.ended = Some(Ok(Finish::Length));
            return;
        }
        let logprobs = self.logprobs.map(|most| Logprobs::of(logits, most));
        let restricted = self.constraint.as_mut().map_or(Ok(()), |one| one.restrict(logits));
        if self.must_go_on() {
            for id in self.eos_token_ids.iter().chain(&self.stop_token_ids) {
                if let Some(logit) = logits.get_mut(*id as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        let (sampler, history) = (&mut self.sampler, &self.history);
        match restricted.and_then(|()| sampler.sample_after(logits, history, self.prompt_len)) {
            Ok(token) => {
                self.take(token, logprobs.map(|all| all.of_choice(token)));
                self.tell(events);
            }
            Err(error) => self.ended = Some(Err(error)),
        }
    }

    /// Takes the next token, which may end the request; none could be chosen where a logit was no number.
    pub(crate) fn accept(&mut self, token: Option<u32>, events: &mut VecDeque<Event>) {
        self.note(token);
        self.tell(events);
    }

    /// Takes the next token as [`accept`](Self::accept) does, but for what its text may end, and leaves it to
    /// [`tell`](Self::tell).
    pub(crate) fn note(&mut self, token: Option<u32>) {
        match token {
            _ if self.max_new_tokens == 0 => self.ended = Some(Ok(Finish::Length)),
            Some(token) => self.take(token, None),
            None => self.ended = Some(Err(Error::Logits { got: "a NaN or infinity".to_owned() })),
        }
    }

    /// Whether its text may end it.
    pub(crate) fn has_stops(&self) -> bool {
        self.text.as_ref().is_some_and(|text| !text.stops.is_empty())
    }

    fn take(&mut self, token: u32, logprobs: Option<TokenLogprobs>) {
        if self.eos_token_ids.contains(&token) {
            self.ended = Some(Ok(Finish::Eos));
            return;
        }
        if self.stop_token_ids.contains(&token) {
            self.ended = Some(Ok(Finish::Stopped));
            self.untold = Some(Untold::Rest);
            return;
        }
        self.history.push(token);
        self.untold = Some(Untold::Token(token, logprobs));
        if self.room == 0 || self.history.len() - self.prompt_len >= self.max_new_tokens {
            self.ended = Some(Ok(Finish::Length));
        }
        match self.constraint.as_mut().map_or(Ok(false), |one| one.accept(token)) {
            Ok(true) => self.ended = Some(Ok(Finish::Eos)),
            Ok(false) => {}
            Err(error) => self.ended = Some(Err(error)),
        }
    }

    /// Tells of the token that was taken, and of its text.
    pub(crate) fn tell(&mut self, events: &mut VecDeque<Event>) {
        let token = match self.untold.take() {
            Some(Untold::Token(token, logprobs)) => {
                events.push_back(Event::Token { id: self.id, token, logprobs });
                token
            }
            Some(Untold::Rest) => {
                match self.text.as_mut().map_or(Ok(String::new()), Text::finish) {
                    Ok(rest) => tell(self.id, rest, events),
                    Err(error) => self.ended = Some(Err(error)),
                }
                return;
            }
            None => return,
        };
        let may_stop = self.new_tokens() > self.min_new_tokens;
        let Some(text) = &mut self.text else { return };
        match text.push(token, may_stop) {
            Ok((piece, stopped)) => {
                tell(self.id, piece, events);
                if stopped {
                    self.ended = Some(Ok(Finish::Stopped));
                }
            }
            Err(error) => self.ended = Some(Err(error)),
        }
    }

    /// Tells how the request ended; where it has not, the caller has ended it.
    pub(crate) fn finish(mut self, events: &mut VecDeque<Event>) {
        let id = self.id;
        let end = self.ended.take().unwrap_or(Ok(Finish::Stopped)).and_then(|finish| {
            if let (Some(text), true) = (&mut self.text, finish != Finish::Stopped) {
                tell(id, text.finish()?, events);
            }
            Ok(finish)
        });
        events.push_back(match end {
            Ok(finish) => Event::Done { id, completion: self.completion(finish) },
            Err(error) => Event::Failed { id, error },
        });
    }

    /// All that was told of so far.
    pub(crate) fn completion(self, finish: Finish) -> Completion {
        let text = self.text.map_or_else(String::new, |text| text.whole);
        Completion { text, tokens: self.history[self.prompt_len..].to_vec(), finish }
    }
}

impl Text {
    /// The text that a token made certain, and whether it reached a stop string, if it may.
    fn push(&mut self, token: u32, may_stop: bool) -> Result<(String, bool)> {
        let piece = self.stream.push(token)?.unwrap_or_default();
        let (piece, stopped) = if may_stop { self.stops.push(&piece) } else { (piece, false) };
        self.whole.push_str(&piece);
        Ok((piece, stopped))
    }

    /// What was held back for a character or a stop string that did not come.
    fn finish(&mut self) -> Result<String> {
        let (mut piece, stopped) = self.stops.push(&self.stream.finish()?.unwrap_or_default());
        if !stopped {
            piece.push_str(&self.stops.finish());
        }
        self.whole.push_str(&piece);
        Ok(piece)
    }
}

fn tell(id: RequestId, piece: String, events: &mut VecDeque<Event>) {
    if !piece.is_empty() {
        events.push_back(Event::Text { id, piece });
    }
}
