//! LongBench and LV-Eval: their prompts, lengths of answers and metrics, on their files.

use std::path::Path;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::checkpoint::Checkpoint;
use crate::device::Math;
use crate::eval::jsonl;
use crate::eval::metrics::Metric;
use crate::eval::{Prompting, Question, Reference, Scoring};
use crate::{Error, Result};

/// A line of a file of LongBench or LV-Eval.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct LongBenchCase {
    /// The question, or what else the task is about.
    pub input: String,
    /// The long text.
    pub context: String,
    /// Right answers, at least one.
    #[serde(deserialize_with = "some_answers")]
    pub answers: Vec<String>,
    /// All classes of a classification.
    #[serde(default)]
    pub all_classes: Option<Vec<String>>,
    /// LV-Eval's keywords of the answer.
    #[serde(default)]
    pub answer_keywords: Option<String>,
    /// Name of the dataset, as the file gives it.
    #[serde(default)]
    pub dataset: Option<String>,
}

/// Answers of which there are some: nothing could be right of others.
fn some_answers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let answers = Vec::deserialize(deserializer)?;
    match answers.is_empty() {
        false => Ok(answers),
        true => Err(D::Error::invalid_length(0, &"`answers` of at least one")),
    }
}

impl LongBenchCase {
    /// Reads cases, one JSON object a line.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Line`] with the line that is not a case.
    pub fn load(path: impl AsRef<Path>) -> Result<Vec<Self>> {
        jsonl::load(path.as_ref())
    }
}

/// A dataset of LongBench or LV-Eval: how it asks and how it is scored. Scores of Chinese ones are not those of the
/// benchmarks, which cut texts into words by a dictionary ([`chinese_words`](crate::metrics::chinese_words)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LongBenchDataset {
    /// Name in its benchmark.
    pub name: &'static str,
    /// Most tokens of an answer.
    pub max_new_tokens: usize,
    /// `{context}` and `{input}` are replaced.
    prompt: &'static str,
    score: Score,
    /// Examples and code are continued, not answered in a chat.
    chat: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Score {
    F1,
    /// LV-Eval's, with the keywords of the case and of the answers the first alone.
    KeywordF1,
    /// LV-Eval's of the first answer alone.
    FirstF1,
    F1Zh,
    /// LV-Eval's, as `KeywordF1`.
    KeywordF1Zh,
    /// LV-Eval's of the first answer alone.
    FirstF1Zh,
    /// Of the first line.
    LineF1,
    Rouge,
    RougeZh,
    /// LV-Eval's of the first answer alone, without common words.
    ContentRougeZh,
    LineRouge,
    LineClass,
    Paragraph,
    ParagraphZh,
    Count,
    Code,
}

const PASSAGES: &str = "Answer the question based on the given passages. Only give me the answer and do not \
    output any other words.\n\nThe following are given passages.\n{context}\n\nAnswer the question based on \
    the given passages. Only give me the answer and do not output any other words.\n\nQuestion: {input}\n\
    Answer:";

const ONE_PASSAGE: &str = "Please answer the following question based on the given passages. Questions and \
    answers are only relevant to one passage. Only give me the answer and do not output any other \
    explanation and evidence.\n\nArticle: {context}\n\nPlease answer the following question based on the \
    above passages. Questions and answers are only relevant to one passage. Only give me the answer and do \
    not output any other explanation and evidence.\n\nQuestion: {input}\nAnswer:";

const ONE_ARTICLE_ZH: &str = "请根据下面给定的文章回答问题，问题和答案只与其中一篇文章有关。\n\n文章：{context}\n\n\
    现在请基于上述文章回答下面的问题，问题和答案只与其中一篇文章有关。\n\n问题：{input}\n回答：";

const fn dataset(
    name: &'static str,
    max_new_tokens: usize,
    score: Score,
    prompt: &'static str,
) -> LongBenchDataset {
    LongBenchDataset { name, max_new_tokens, prompt, score, chat: true }
}

const fn continued(
    name: &'static str,
    max_new_tokens: usize,
    score: Score,
    prompt: &'static str,
) -> LongBenchDataset {
    LongBenchDataset { name, max_new_tokens, prompt, score, chat: false }
}

const DATASETS: [LongBenchDataset; 32] = [
    dataset(
        "narrativeqa",
        128,
        Score::F1,
        "You are given a story, which can be either a novel or a movie script, and a question. Answer the \
         question as concisely as you can, using a single phrase if possible. Do not provide any \
         explanation.\n\nStory: {context}\n\nNow, answer the question based on the story as concisely as \
         you can, using a single phrase if possible. Do not provide any explanation.\n\nQuestion: \
         {input}\n\nAnswer:",
    ),
    dataset(
        "qasper",
        128,
        Score::F1,
        "You are given a scientific article and a question. Answer the question as concisely as you can, \
         using a single phrase or sentence if possible. If the question cannot be answered based on the \
         information in the article, write \"unanswerable\". If the question is a yes/no question, answer \
         \"yes\", \"no\", or \"unanswerable\". Do not provide any explanation.\n\nArticle: {context}\n\n \
         Answer the question based on the above article as concisely as you can, using a single phrase or \
         sentence if possible. If the question cannot be answered based on the information in the article, \
         write \"unanswerable\". If the question is a yes/no question, answer \"yes\", \"no\", or \
         \"unanswerable\". Do not provide any explanation.\n\nQuestion: {input}\n\nAnswer:",
    ),
    dataset(
        "multifieldqa_en",
        64,
        Score::F1,
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question \
         based on the above text, only give me the answer and do not output any other words.\n\nQuestion: \
         {input}\nAnswer:",
    ),
    dataset("hotpotqa", 32, Score::F1, PASSAGES),
    dataset("2wikimqa", 32, Score::F1, PASSAGES),
    dataset("musique", 32, Score::F1, PASSAGES),
    dataset(
        "gov_report",
        512,
        Score::Rouge,
        "You are given a report by a government agency. Write a one-page summary of the report.\n\n\
         Report:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
    ),
    dataset(
        "qmsum",
        512,
        Score::Rouge,
        "You are given a meeting transcript and a query containing a question or instruction. Answer the \
         query in one or more sentences.\n\nTranscript:\n{context}\n\nNow, answer the query based on the \
         above meeting transcript in one or more sentences.\n\nQuery: {input}\nAnswer:",
    ),
    dataset(
        "multi_news",
        512,
        Score::Rouge,
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\n\
         Now, write a one-page summary of all the news.\n\nSummary:",
    ),
    continued(
        "trec",
        64,
        Score::LineClass,
        "Please determine the type of the question below. Here are some examples of questions.\n\n\
         {context}\n{input}",
    ),
    continued(
        "triviaqa",
        32,
        Score::LineF1,
        "Answer the question based on the given passage. Only give me the answer and do not output any \
         other words. The following are some examples.\n\n{context}\n\n{input}",
    ),
    continued(
        "samsum",
        128,
        Score::LineRouge,
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n\
         {context}\n\n{input}",
    ),
    dataset(
        "passage_count",
        32,
        Score::Count,
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please \
         carefully read these paragraphs and determine how many unique paragraphs there are after removing \
         duplicates. In other words, how many non-repeating paragraphs are there in total?\n\n{context}\n\n\
         Please enter the final count of unique paragraphs after removing duplicates. The output format \
         should only contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: ",
    ),
    dataset(
        "passage_retrieval_en",
        32,
        Score::Paragraph,
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph \
         the abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the \
         number of the paragraph that the abstract is from. The answer format must be like \"Paragraph 1\", \
         \"Paragraph 2\", etc.\n\nThe answer is: ",
    ),
    continued(
        "lcc",
        64,
        Score::Code,
        "Please complete the code given below. \n{context}Next line of code:\n",
    ),
    continued(
        "repobench-p",
        64,
        Score::Code,
        "Please complete the code given below. \n{context}{input}Next line of code:\n",
    ),
    dataset(
        "hotpotwikiqa_mixup",
        64,
        Score::KeywordF1,
        "Answer the question based on the given passages. Questions and answers are only relevant to some \
         passages. Only give me the answer and do not output any other explanation and evidence.\n\n\
         Article: {context}\n\nPlease answer the following question based on the above passages. Questions \
         and answers are only relevant to some passages. Only give me the answer and do not output any \
         other explanation and evidence.\n\nQuestion: {input}\nAnswer:",
    ),
    dataset("loogle_SD_mixup", 64, Score::KeywordF1, ONE_PASSAGE),
    dataset("loogle_CR_mixup", 64, Score::KeywordF1, ONE_PASSAGE),
    dataset("loogle_MIR_mixup", 64, Score::KeywordF1, ONE_PASSAGE),
    dataset("multifieldqa_en_mixup", 64, Score::KeywordF1, ONE_PASSAGE),
    dataset(
        "multifieldqa_zh",
        64,
        Score::F1Zh,
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其\
         他字词。\n\n问题：{input}\n回答：",
    ),
    dataset(
        "dureader",
        128,
        Score::RougeZh,
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
    ),
    dataset(
        "vcsum",
        512,
        Score::RougeZh,
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
    ),
    continued(
        "lsht",
        64,
        Score::LineClass,
        "请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}",
    ),
    dataset(
        "passage_retrieval_zh",
        32,
        Score::ParagraphZh,
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n下面是一个摘要\n\n\
         {input}\n\n请输入摘要所属段落的编号。答案格式必须是\"段落1\"，\"段落2\"等格式\n\n答案是：",
    ),
    dataset(
        "multifieldqa_zh_mixup",
        64,
        Score::KeywordF1Zh,
        "请阅读以下文章并用中文回答问题，问题和答案只与其中一篇文章有关。只需要直接给出问题的答案，不要输出其他任何解释和证据。\
         \n\n文章：{context}\n\n请基于上面的文章回答下面的问题，问题和答案只与其中一篇文章有关。只需要直接给出问题的答案，\
         不要输出其他任何解释和证据。\n\n问题：{input}\n回答：",
    ),
    dataset("cmrc_mixup", 64, Score::KeywordF1Zh, ONE_ARTICLE_ZH),
    dataset(
        "lic_mixup",
        64,
        Score::KeywordF1Zh,
        "请根据下面给定的文章回答问题，问题和答案只与其中一篇文章有关。\n\n文章：{context}\n\n请现在基于上述文章回答下面的\
         问题，问题和答案只与其中一篇文章有关。\n\n问题：{input}\n回答：",
    ),
    dataset("dureader_mixup", 64, Score::ContentRougeZh, ONE_ARTICLE_ZH),
    dataset(
        "factrecall_zh",
        16,
        Score::FirstF1Zh,
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n现在请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
    ),
    dataset(
        "factrecall_en",
        16,
        Score::FirstF1,
        "Please answer the following questions based on the given article.\n\nArticle: {context}\n\nPlease \
         answer the following questions based on the above article.\n\nQuestion: {input}\nAnswer:",
    ),
];

impl LongBenchDataset {
    /// A dataset by its name; LV-Eval's with their length (`factrecall_en_16k`) and LongBench-E's with
    /// their `_e` are the same datasets.
    ///
    /// # Errors
    /// [`Error::Invalid`], which lists the names.
    pub fn named(name: &str) -> Result<&'static Self> {
        let by = |name: &str| DATASETS.iter().find(|dataset| dataset.name == name);
        let base = name.rsplit_once('_').filter(|(_, end)| {
            let is_length = end.strip_suffix('k').is_some_and(|n| n.parse::<u32>().is_ok());
            is_length || *end == "e"
        });
        by(name).or_else(|| by(base?.0)).ok_or_else(|| {
            let names: Vec<_> = DATASETS.iter().map(|dataset| dataset.name).collect();
            Error::invalid("dataset", names.join(", "), name)
        })
    }

    /// The case as a question, whole.
    pub fn question(&self, case: &LongBenchCase) -> Question {
        // The context may hold anything, `{input}` too.
        let (before, rest) = self.prompt.split_once("{context}").unwrap_or((self.prompt, ""));
        let text = format!("{before}{}{}", case.context, rest.replace("{input}", &case.input));
        let line = |metric| Metric::FirstLine(Box::new(metric));
        let metric = match self.score {
            Score::F1 | Score::FirstF1 => Metric::F1,
            Score::KeywordF1 => Metric::KeywordF1(case.answer_keywords.clone().unwrap_or_default()),
            Score::F1Zh | Score::FirstF1Zh => Metric::F1Zh,
            Score::KeywordF1Zh => {
                Metric::KeywordF1Zh(case.answer_keywords.clone().unwrap_or_default())
            }
            Score::RougeZh => Metric::RougeZh,
            Score::ContentRougeZh => Metric::ContentRougeZh,
            Score::ParagraphZh => Metric::ParagraphZh,
            Score::LineF1 => line(Metric::F1),
            Score::Rouge => Metric::RougeL,
            Score::LineRouge => line(Metric::RougeL),
            Score::LineClass => {
                line(Metric::Classification(case.all_classes.clone().unwrap_or_default()))
            }
            Score::Paragraph => Metric::Paragraph,
            Score::Count => Metric::Count,
            Score::Code => Metric::Code,
        };
        let answers = match self.score {
            Score::KeywordF1 | Score::FirstF1 => 1,
            Score::KeywordF1Zh | Score::FirstF1Zh | Score::ContentRougeZh => 1,
            _ => case.answers.len(),
        };
        let reference = |text: &String| Reference { text: text.clone(), depth: None };
        let references = case.answers.iter().take(answers).map(reference).collect();
        let prompting = if self.chat { Prompting::Chat } else { Prompting::Text };
        Question { prompting, ..Question::one(text, references, Scoring::Metric(metric)) }
    }
}

impl<D: Math> Checkpoint<D> {
    /// A question whose context, answer included, takes at most `length` tokens: of a longer one, tokens
    /// in the middle of the text are left out, as LongBench does it; the beginning holds the
    /// instruction, the end the question. Of a question of several messages, nothing is.
    ///
    /// # Errors
    /// [`Error::ContextExceeded`] if no text fits; those of [`question_context`](Self::question_context).
    pub fn fitted(
        &self,
        question: &Question,
        max_new_tokens: usize,
        length: usize,
    ) -> Result<Question> {
        let takes = |question: &Question| self.question_context(question, max_new_tokens);
        let whole = takes(question)?;
        let [turn] = question.turns.as_slice() else { return Ok(question.clone()) };
        if whole <= length {
            return Ok(question.clone());
        }
        let tokens = self.tokenizer.encode(&turn.text, false)?;
        let mut room = (tokens.len() + length).saturating_sub(whole);
        while room > 1 {
            let (head, tail) = (room / 2, tokens.len() - room.div_ceil(2));
            let mut cut = question.clone();
            cut.turns[0].text = [&tokens[..head], &tokens[tail..]]
                .map(|part| self.tokenizer.decode(part, true))
                .into_iter()
                .collect::<Result<String>>()?;
            let takes = takes(&cut)?;
            if takes <= length {
                return Ok(cut);
            }
            // The two ends may have a few tokens more where they meet.
            room = room.saturating_sub(takes - length);
        }
        Err(Error::ContextExceeded { asked: whole - tokens.len() + 2, limit: length })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case() -> LongBenchCase {
        LongBenchCase {
            input: "Who is it?".into(),
            context: "A text with {input} in it.".into(),
            answers: vec!["Ann".into(), "Bob Ray".into()],
            all_classes: Some(vec!["Ann".into(), "Bob Ray".into()]),
            answer_keywords: Some("Ann".into()),
            dataset: None,
        }
    }

    fn score(name: &str, answer: &str) -> f64 {
        let question = LongBenchDataset::named(name).unwrap().question(&case());
        question.scoring.score(answer, &question.turns[0].references).0
    }

    #[test]
    fn datasets_are_found_by_name_and_score_as_their_benchmark_does() {
        assert_eq!(LongBenchDataset::named("factrecall_en_128k").unwrap().name, "factrecall_en");
        assert_eq!(LongBenchDataset::named("qasper_e").unwrap().name, "qasper");
        let error = LongBenchDataset::named("squad").unwrap_err().to_string();
        assert!(error.contains("squad") && error.contains("repobench-p"), "{error}");
        assert_eq!(score("hotpotqa", "Bob Ray"), 1.0);
        assert_eq!(score("triviaqa", "\nBob Ray\nPassage: more"), 1.0);
        assert_eq!(score("trec", "Ann\nBob Ray"), 1.0);
        assert!(score("gov_report", "Bob Ray") > 0.999);
        // LV-Eval compares with the first answer, and wants its keywords.
        assert_eq!(score("loogle_SD_mixup_16k", "Bob Ray"), 0.0);
        assert_eq!(score("factrecall_en", "Bob Ray"), 0.0);
        assert_eq!(score("factrecall_en", "ann"), 1.0);
        assert_eq!(score("multifieldqa_zh", "bob ray！"), 1.0);
        assert!(score("dureader", "Bob Ray") > 0.999 && score("dureader_mixup", "Bob Ray") == 0.0);
        assert_eq!((score("cmrc_mixup_16k", "Ann"), score("cmrc_mixup", "Bob Ray")), (1.0, 0.0));
        assert_eq!(score("lsht", "Ann\nBob Ray"), 1.0);
    }

    #[test]
    fn prompts_hold_context_and_input_and_those_with_examples_are_continued() {
        for dataset in DATASETS {
            let question = dataset.question(&case());
            let text = &question.turns[0].text;
            assert!(text.contains("A text with {input} in it."), "{}", dataset.name);
            let asks = !["gov_report", "multi_news", "passage_count", "vcsum", "lcc"]
                .contains(&dataset.name);
            assert_eq!(text.contains("Who is it?"), asks, "{}", dataset.name);
            let text = ["trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"]
                .contains(&dataset.name);
            assert_eq!(question.prompting == Prompting::Text, text, "{}", dataset.name);
        }
    }
}
