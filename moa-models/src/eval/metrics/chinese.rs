//! LongBench's and LV-Eval's metrics of Chinese texts, over words by a rule instead of a dictionary.

use super::f1::{common, of_words};
use super::rouge::rouge_l;

/// Words of a Chinese text: each Han character or kana is one, a run of other letters and digits is one, and so is
/// each other character that is no white space.
///
/// The benchmarks cut texts with jieba, by a dictionary and a statistical model; characters are the usual choice
/// without one. Scores are comparable with each other and not with published ones: answers share characters more
/// often than words.
pub fn chinese_words(text: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    let mut in_run = false;
    for c in text.chars() {
        let joins = c.is_alphanumeric() && !is_word_alone(c);
        match words.last_mut().filter(|_| joins && in_run) {
            Some(word) => word.push(c),
            None if c.is_whitespace() => {}
            None => words.push(c.to_string()),
        }
        in_run = joins;
    }
    words
}

/// Han characters and kana.
fn is_word_alone(c: char) -> bool {
    matches!(c, '\u{3005}'..='\u{3007}' | '\u{3040}'..='\u{30ff}' | '\u{3400}'..='\u{4dbf}'
        | '\u{4e00}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3ffff}')
}

/// `qa_f1_zh_score`: F1 over [`chinese_words`] in lower case, without punctuation.
pub fn f1_zh(prediction: &str, reference: &str) -> f64 {
    of_words(&normalised(prediction), &normalised(reference))
}

/// LV-Eval's [`f1_zh`]: 0 where the prediction has less than two fifths of the words of `keywords`, of which common
/// ones are never found. Without keywords, the reference's words are those.
pub fn keyword_f1_zh(prediction: &str, reference: &str, keywords: &str) -> f64 {
    let keywords = normalised(if keywords.is_empty() { reference } else { keywords });
    let words = normalised(prediction);
    let found = common(&words, &keywords).filter(|word| !is_common(word)).count();
    if 5 * found < 2 * keywords.len() { 0.0 } else { f1_zh(prediction, reference) }
}

/// `rouge_zh_score`: [`rouge_l`] over [`chinese_words`].
pub fn rouge_zh(prediction: &str, reference: &str) -> f64 {
    rouge_l(&chinese_words(prediction).join(" "), &chinese_words(reference).join(" "))
}

/// LV-Eval's [`rouge_zh`]: in lower case, without punctuation and common words.
pub fn content_rouge_zh(prediction: &str, reference: &str) -> f64 {
    let content = |text: &str| {
        let words = normalised(text).into_iter().filter(|word| !is_common(word));
        words.collect::<Vec<_>>().join(" ")
    };
    rouge_l(&content(prediction), &content(reference))
}

fn normalised(text: &str) -> Vec<String> {
    let is_sign = |word: &String| word.chars().all(is_punctuation);
    chinese_words(&text.to_lowercase()).into_iter().filter(|word| !is_sign(word)).collect()
}

fn is_punctuation(c: char) -> bool {
    // As the benchmarks list it: ASCII's, its full-width forms, and those of Chinese texts.
    c.is_ascii_punctuation()
        || matches!(c, '\u{ff01}'..='\u{ff0f}' | '\u{ff1a}'..='\u{ff20}' | '\u{ff3b}'..='\u{ff40}'
            | '\u{ff5b}'..='\u{ff64}' | '\u{3001}'..='\u{3003}' | '\u{3008}'..='\u{3011}'
            | '\u{3014}'..='\u{301f}' | '\u{3030}' | '\u{303e}' | '\u{303f}' | '\u{2013}' | '\u{2014}'
            | '\u{2018}'..='\u{201f}' | '\u{2026}' | '\u{2027}' | '\u{fe4f}')
}

/// The words of one character of LV-Eval's list of common ones.
fn is_common(word: &str) -> bool {
    const COMMON: &str = "的和是等在年为与‰了或月c至日有于不中×小由亩也要指法会元对号以所后丁无将用能形而从到但让并上类才来\
                          地片个时给你使条受带度";
    let mut characters = word.chars();
    matches!((characters.next(), characters.next()), (Some(c), None) if COMMON.contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_characters_and_runs() {
        assert_eq!(
            chinese_words("GPT-4 在2023年 发布。"),
            ["GPT", "-", "4", "在", "2023", "年", "发", "布", "。"]
        );
        assert_eq!(chinese_words(" \n"), [""; 0]);
        assert_eq!(chinese_words("a b"), ["a", "b"]);
    }

    #[test]
    fn known_scores() {
        assert_eq!(f1_zh("北京。", "北京"), 1.0);
        // 2 of 3 and 2 of 4 characters.
        assert!((f1_zh("南京市", "《北京市区》") - 4.0 / 7.0).abs() < 1e-12);
        assert_eq!(f1_zh("Abc", "ABC！"), 1.0);
        assert_eq!(f1_zh("", "北京"), 0.0);
        assert!((rouge_zh("我爱北京", "我在北京") - 0.75).abs() < 1e-7);
        assert_eq!(rouge_zh("", "北京"), 0.0);
        // 是 and 的 do not count.
        assert!((content_rouge_zh("是北京的", "北京") - 1.0).abs() < 1e-7);
        assert!(rouge_zh("是北京的", "北京") < 0.7);
    }

    #[test]
    fn an_answer_without_the_keywords_is_worth_nothing() {
        assert_eq!(keyword_f1_zh("他在南京", "他在北京", "北"), 0.0);
        assert!(keyword_f1_zh("他在北京", "他在北京", "北京") > 0.99);
        // Without keywords the answer's own words are wanted: one of four is too few, as 在 is never found.
        assert_eq!(keyword_f1_zh("在京", "他在北京", ""), 0.0);
        assert!(keyword_f1_zh("北京", "他在北京", "") > 0.6);
    }
}
