use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::question::Question;
use crate::engine::request::Usage;
use crate::{Error, Result};

/// A reference of a question, and whether the answer held it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Asked {
    /// What the answer had to hold.
    pub text: String,
    /// Where the context says it, from 0 to 1.
    pub depth: Option<f64>,
    /// Whether it did.
    pub found: bool,
}

/// The outcome of one question: its score, the model's answers, and what they cost.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RetrievalItem {
    /// Size that the question was made for, in the evaluation's unit: record lines or tokens.
    pub size: Option<usize>,
    /// Index in the file, or of the draw.
    pub case: usize,
    /// Share of the references that the answers held.
    pub score: f64,
    /// The references that the answers had to hold, and whether they did.
    pub references: Vec<Asked>,
    /// What the model wrote, a text per message.
    pub answers: Vec<String>,
    /// Tokens of the messages.
    pub prompt_tokens: usize,
    /// Context length that the sequence was opened for.
    pub context: usize,
    /// Keys kept / context length.
    pub density: f64,
    /// Entries held, summed over all tokens read and written, as a share of dense attention's
    /// ([`Plan::kv_footprint`](moa_core::Plan::kv_footprint)); `None` in logs of before it was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_footprint: Option<f64>,
    /// Bytes of keys and values that the sequence held, read from its caches.
    pub kv_bytes: u64,
    /// The same for dense attention, computed.
    pub kv_bytes_dense: u64,
    /// Most bytes in use at once while it was asked
    /// ([`Decoder::peak_memory`](crate::Decoder::peak_memory)); `None` where that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<u64>,
    /// Decode steps.
    pub new_tokens: usize,
    /// Time to read the messages.
    pub prefill_seconds: f64,
    /// Time of the decode steps.
    pub decode_seconds: f64,
}

impl RetrievalItem {
    /// Whether the answers have the full score.
    pub fn is_right(&self) -> bool {
        self.score >= 1.0
    }

    /// Scores the answers, and says which references they hold.
    pub(crate) fn grade(&mut self, question: &Question) {
        let (mut sum, mut weights) = (0.0, 0.0);
        for (turn, answer) in question.turns.iter().zip(&self.answers) {
            let (score, weight) = question.scoring.score(answer, &turn.references);
            (sum, weights) = (sum + score * weight, weights + weight);
            self.references.extend(turn.references.iter().map(|reference| Asked {
                found: question.scoring.holds(answer, &reference.text),
                text: reference.text.clone(),
                depth: reference.depth,
            }));
        }
        self.score = sum / weights.max(1.0);
    }

    /// Adds what a turn read and wrote.
    pub(crate) fn add(&mut self, usage: &Usage) {
        self.prompt_tokens += usage.prompt_tokens;
        self.new_tokens += usage.decoded_tokens;
        self.prefill_seconds += usage.prefill.as_secs_f64();
        self.decode_seconds += usage.decode.as_secs_f64();
    }
}

/// The outcomes of a set of questions, summed up.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RetrievalReport {
    /// Questions asked.
    pub cases: usize,
    /// Questions with the full score.
    pub correct: usize,
    /// Mean score; `correct / cases` where every question has one reference.
    pub accuracy: f64,
    /// Standard error of the accuracy, from the scatter of scores; 0 where all are equal.
    pub standard_error: f64,
    /// Mean tokens of the messages.
    pub prompt_tokens_mean: f64,
    /// Mean context length: messages and room for answers.
    pub context_mean: f64,
    /// Mean over questions of keys kept / context length.
    pub density: f64,
    /// Mean over questions of keys that a KV head may keep.
    pub average_span: f64,
    /// Mean KV footprint of the questions for which it was measured; `None` if it was for none.
    pub kv_footprint: Option<f64>,
    /// Mean bytes of keys and values that a sequence held, read from its caches.
    pub kv_bytes: u64,
    /// The same for dense attention, computed.
    pub kv_bytes_dense: u64,
    /// Most bytes in use at once while any of the questions was asked.
    pub peak_bytes: Option<u64>,
    /// Prompt tokens read per second.
    pub prefill_tokens_per_second: f64,
    /// New tokens per second, one sequence at a time.
    pub decode_tokens_per_second: f64,
    /// Time for all questions.
    pub seconds: f64,
    /// Each question.
    pub items: Vec<RetrievalItem>,
}

/// References of a stretch of the context.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct DepthBin {
    /// Shallowest depth.
    pub from: f64,
    /// Depth where the next bin begins.
    pub to: f64,
    /// References there.
    pub asked: usize,
    /// Those found.
    pub found: usize,
    /// `found / asked`.
    pub accuracy: f64,
}

impl RetrievalReport {
    /// The report of some items.
    ///
    /// # Errors
    /// [`Error::Invalid`] if there is none.
    pub fn new(items: Vec<RetrievalItem>) -> Result<Self> {
        if items.is_empty() {
            return Err(Error::invalid("cases", "at least 1", 0));
        }
        let n = items.len() as f64;
        let sum = |field: &dyn Fn(&RetrievalItem) -> f64| items.iter().map(field).sum::<f64>();
        let bytes = |field: &dyn Fn(&RetrievalItem) -> u64| {
            items.iter().map(field).sum::<u64>() / items.len() as u64
        };
        let prompt_tokens = sum(&|i| i.prompt_tokens as f64);
        let accuracy = sum(&|i| i.score) / n;
        let scatter = sum(&|i| (i.score - accuracy).powi(2));
        let footprints: Vec<f64> = items.iter().filter_map(|i| i.kv_footprint).collect();
        let footprint = footprints.iter().sum::<f64>() / footprints.len() as f64;
        let (prefill, decode) = (sum(&|i| i.prefill_seconds), sum(&|i| i.decode_seconds));
        Ok(Self {
            cases: items.len(),
            correct: items.iter().filter(|i| i.is_right()).count(),
            accuracy,
            standard_error: (scatter / (n - 1.0).max(1.0) / n).sqrt(),
            prompt_tokens_mean: prompt_tokens / n,
            context_mean: sum(&|i| i.context as f64) / n,
            density: sum(&|i| i.density) / n,
            average_span: sum(&|i| i.density * i.context as f64) / n,
            kv_footprint: (!footprints.is_empty()).then_some(footprint),
            kv_bytes: bytes(&|i| i.kv_bytes),
            kv_bytes_dense: bytes(&|i| i.kv_bytes_dense),
            peak_bytes: items.iter().filter_map(|i| i.peak_bytes).max(),
            prefill_tokens_per_second: prompt_tokens / prefill.max(1e-9),
            decode_tokens_per_second: sum(&|i| i.new_tokens as f64) / decode.max(1e-9),
            seconds: prefill + decode,
            items,
        })
    }

    /// A report for each size, ascending.
    pub fn by_size(&self) -> Vec<Self> {
        let mut sizes: BTreeMap<Option<usize>, Vec<RetrievalItem>> = BTreeMap::new();
        for item in &self.items {
            sizes.entry(item.size).or_default().push(item.clone());
        }
        sizes.into_values().filter_map(|items| Self::new(items).ok()).collect()
    }

    /// References by where the context says them, in `bins` stretches of equal width; those that hold
    /// none are left out.
    pub fn by_depth(&self, bins: usize) -> Vec<DepthBin> {
        let bins = bins.max(1);
        let mut counts = vec![(0, 0); bins];
        for reference in self.items.iter().flat_map(|item| &item.references) {
            let Some(depth) = reference.depth else { continue };
            let (asked, found) = &mut counts[((depth * bins as f64) as usize).min(bins - 1)];
            *asked += 1;
            *found += usize::from(reference.found);
        }
        let edge = |bin: usize| bin as f64 / bins as f64;
        let bin = |(bin, (asked, found))| DepthBin {
            from: edge(bin),
            to: edge(bin + 1),
            asked,
            found,
            accuracy: found as f64 / asked as f64,
        };
        counts.into_iter().enumerate().filter(|(_, (asked, _))| *asked > 0).map(bin).collect()
    }
}

/// Accuracy from which a length belongs to the effective context, as in the MoA paper.
pub const EFFECTIVE_ACCURACY: f64 = 0.9;

/// How far a model retrieves, against the keys it keeps for that.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EffectiveContext {
    /// The longest context, in tokens, that reached [`EFFECTIVE_ACCURACY`].
    pub context: f64,
    /// Keys that a KV head may keep there, on average.
    pub average_span: f64,
    /// `context / average_span`.
    pub ratio: f64,
    /// Shorter contexts that did not reach it, ascending: the claim has holes there.
    pub missed: Vec<f64>,
}

/// The effective context length of reports of several lengths; `None` if all of them miss
/// [`EFFECTIVE_ACCURACY`].
pub fn effective_context(reports: &[RetrievalReport]) -> Option<EffectiveContext> {
    let mut reports: Vec<_> = reports.iter().collect();
    reports.sort_by(|a, b| a.context_mean.total_cmp(&b.context_mean));
    let reaches = |report: &&RetrievalReport| report.accuracy >= EFFECTIVE_ACCURACY;
    let longest = reports.iter().rposition(reaches)?;
    let (context, average_span) = (reports[longest].context_mean, reports[longest].average_span);
    let missed = reports[..longest].iter().filter(|r| !reaches(r)).map(|r| r.context_mean);
    let missed = missed.collect();
    Some(EffectiveContext { context, average_span, ratio: context / average_span, missed })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(size: usize, depths: &[(f64, bool)]) -> RetrievalItem {
        let references: Vec<_> = depths
            .iter()
            .map(|&(depth, found)| Asked { text: "1".into(), depth: Some(depth), found })
            .collect();
        let found = references.iter().filter(|r| r.found).count();
        RetrievalItem {
            size: Some(size),
            score: found as f64 / references.len() as f64,
            references,
            context: 10 * size,
            density: 0.25,
            ..RetrievalItem::default()
        }
    }

    #[test]
    fn sizes_and_depths_are_kept_apart() {
        let items =
            vec![item(40, &[(0.0, true), (1.0, false)]), item(20, &[(0.5, true)]), item(40, &[])];
        let mut items = items;
        items[2].score = 1.0;
        let report = RetrievalReport::new(items).unwrap();
        assert_eq!((report.cases, report.correct), (3, 2));
        assert!((report.accuracy - 2.5 / 3.0).abs() < 1e-12);
        assert!((report.standard_error - 1.0 / 6.0).abs() < 1e-12);
        let sizes = report.by_size();
        assert_eq!(
            sizes.iter().map(|r| (r.items[0].size, r.cases)).collect::<Vec<_>>(),
            [(Some(20), 1), (Some(40), 2)]
        );
        // A depth of 1 belongs to the last bin.
        let bins: Vec<_> = report.by_depth(4).iter().map(|b| (b.from, b.asked, b.found)).collect();
        assert_eq!(bins, [(0.0, 1, 1), (0.5, 1, 1), (0.75, 1, 0)]);
        assert!(RetrievalReport::new(Vec::new()).is_err());
    }

    #[test]
    fn effective_context_names_the_shorter_ones_that_fail() {
        let report = |size, found| RetrievalReport::new(vec![item(size, &[(0.0, found)])]).unwrap();
        let reports = [report(80, false), report(10, false), report(40, true), report(20, true)];
        let found = effective_context(&reports).unwrap();
        assert_eq!((found.context, found.average_span, found.ratio), (400.0, 100.0, 4.0));
        assert_eq!(found.missed, [100.0]);
        assert_eq!(effective_context(&reports[..2]), None);
    }
}
