//! What Jinja2 knows and the template engine does not, written as what it knows.

use std::borrow::Cow;
use std::ops::Range;

/// The function that a rewritten `format % values` calls.
pub(super) const PERCENT: &str = "__percent__";

/// The same template without `{% generation %}` blocks, which mark the model's turns for training and
/// print what is in them, and without `'..' % values`. Line numbers stay.
///
/// `Err` says why a template is refused: its nesting has to fit the stack.
pub(super) fn rewrite(source: &str) -> Result<Cow<'_, str>, String> {
    let mut out = String::with_capacity(source.len());
    let (mut rest, mut count, mut longest_run) = (source, 0, 0);
    while let Some(at) = rest.find('{') {
        let (before, from) = rest.split_at(at);
        out.push_str(before);
        let len = match from.as_bytes().get(1) {
            Some(b'#') => from.find("#}").map_or(from.len(), |end| end + 2),
            Some(b'{') => {
                let (tokens, len) = tokens(from, "}}");
                count += tokens.len();
                longest_run = longest_run.max(run_of_signs(from, &tokens));
                push_rewritten(&mut out, &from[..len], &tokens);
                len
            }
            Some(b'%') => {
                let (tokens, len) = tokens(from, "%}");
                count += tokens.len();
                longest_run = longest_run.max(run_of_signs(from, &tokens));
                match tokens.first().map(|first| &from[first.text.clone()]) {
                    Some("raw") => {
                        let end = end_of_raw(from, len);
                        out.push_str(&from[..end]);
                        end
                    }
                    // The body of such a block has a scope of its own, as a call block's.
                    Some(tag @ ("generation" | "endgeneration")) if tokens.len() == 1 => {
                        let own = if tag == "generation" { "with" } else { "endwith" };
                        out.push_str(&from[..len].replacen(tag, own, 1));
                        len
                    }
                    _ => {
                        push_rewritten(&mut out, &from[..len], &tokens);
                        len
                    }
                }
            }
            _ => {
                out.push('{');
                rest = &from[1..];
                continue;
            }
        };
        if matches!(from.as_bytes().get(1), Some(b'#')) {
            out.push_str(&from[..len]);
        }
        if longest_run > MOST_SIGNS {
            return Err(format!("at most {MOST_SIGNS} signs follow on each other"));
        }
        if count > MOST_TOKENS {
            return Err(format!(
                "a template has at most {MOST_TOKENS} words and signs in its tags"
            ));
        }
        rest = &from[len..];
    }
    out.push_str(rest);
    Ok(Cow::Owned(out))
}

/// The most signs, or negations, in a row: each is a level of nesting that the engine does not count.
fn run_of_signs(tag: &str, all: &[Token]) -> usize {
    let (mut run, mut longest) = (0, 0);
    for token in all {
        let is_sign = matches!(&tag[token.text.clone()], "-" | "+" | "not");
        run = if is_sign { run + 1 } else { 0 };
        longest = longest.max(run);
    }
    longest
}

/// Where the tag ends that closes a raw block, which begins with `block`'s first `from` bytes.
pub(super) fn end_of_raw(block: &str, from: usize) -> usize {
    let mut at = from;
    while let Some(next) = block[at..].find("{%") {
        at += next;
        let tag = block[at + 2..].trim_start_matches(['-', '+']).trim_start();
        if let Some(end) = tag.strip_prefix("endraw") {
            let close = end.find("%}").map_or(end.len(), |close| close + 2);
            return block.len() - end.len() + close;
        }
        at += 2;
    }
    block.len()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Word,
    Number,
    Open,
    Close,
    Operator,
}

#[derive(Clone, Debug)]
pub(super) struct Token {
    pub(super) kind: Kind,
    pub(super) text: Range<usize>,
    /// The bracket that closes or opens this one.
    pub(super) partner: Option<usize>,
}

/// Most formatting operators of one tag: each takes another look at the tag, and a template is a
/// stranger's.
const MOST: usize = 64;

/// Most tokens of a template, ten times those of the longest known.
const MOST_TOKENS: usize = 100_000;

/// Most signs in a row.
const MOST_SIGNS: usize = 100;

/// The tokens between the two bytes that open a tag and `close`, and the length of the whole tag.
pub(super) fn tokens(tag: &str, close: &str) -> (Vec<Token>, usize) {
    let bytes = tag.as_bytes();
    let (mut tokens, mut open, mut at) = (Vec::<Token>::new(), Vec::new(), 2);
    if matches!(bytes.get(at), Some(b'-' | b'+')) {
        at += 1;
    }
    while at < bytes.len() {
        let rest = &tag[at..];
        let trimmed = rest.strip_prefix(['-', '+']).unwrap_or(rest);
        if open.is_empty() && trimmed.starts_with(close) {
            return (tokens, at + rest.len() - trimmed.len() + close.len());
        }
        let begin = at;
        let while_of = |belongs: fn(char) -> bool| {
            rest.find(|c| !belongs(c)).map_or(tag.len(), |end| begin + end)
        };
        let kind = match bytes[at] {
            quote @ (b'"' | b'\'') => {
                at += 1;
                while at < bytes.len() && bytes[at] != quote {
                    at += if bytes[at] == b'\\' { 2 } else { 1 };
                }
                at = (at + 1).min(bytes.len());
                Kind::Text
            }
            b'(' | b'[' | b'{' => {
                open.push(tokens.len());
                at += 1;
                Kind::Open
            }
            b')' | b']' | b'}' => {
                at += 1;
                Kind::Close
            }
            b'0'..=b'9' => {
                at = while_of(|c| c.is_ascii_alphanumeric() || c == '_');
                Kind::Number
            }
            _ => match rest.chars().next() {
                Some(c) if c.is_whitespace() => {
                    at += c.len_utf8();
                    continue;
                }
                Some(c) if c.is_alphabetic() || c == '_' => {
                    at = while_of(|c| c.is_alphanumeric() || c == '_');
                    Kind::Word
                }
                Some(c) => {
                    at += c.len_utf8();
                    Kind::Operator
                }
                None => break,
            },
        };
        // A backslash at the end may have led into the middle of a character.
        while !tag.is_char_boundary(at) {
            at += 1;
        }
        let partner = if kind == Kind::Close { open.pop() } else { None };
        if let Some(opened) = partner {
            let closed = tokens.len();
            if let Some(token) = tokens.get_mut(opened) {
                token.partner = Some(closed);
            }
        }
        tokens.push(Token { kind, text: begin..at, partner });
    }
    (tokens, tag.len())
}

/// Appends `tag` with every formatting `%` as a call.
fn push_rewritten(out: &mut String, tag: &str, all: &[Token]) {
    let close = if tag.starts_with("{{") { "}}" } else { "%}" };
    let (mut tag, mut all) = (Cow::Borrowed(tag), Cow::Borrowed(all));
    for _ in 0..MOST {
        let found = (1..all.len()).find_map(|at| formatting(&tag, &all, at));
        let Some((left, percent, right)) = found else { break };
        let call = format!(
            "{}{PERCENT}({},{}){}",
            &tag[..left.start],
            &tag[left.start..percent.start],
            &tag[percent.end..right.end],
            &tag[right.end..],
        );
        all = Cow::Owned(tokens(&call, close).0);
        tag = Cow::Owned(call);
    }
    out.push_str(&tag);
}

/// The operands of a `%` that formats: it stands behind a literal text, or before a tuple.
fn formatting(
    tag: &str,
    all: &[Token],
    at: usize,
) -> Option<(Range<usize>, Range<usize>, Range<usize>)> {
    let text = |token: &Token| &tag[token.text.clone()];
    if all[at].kind != Kind::Operator || text(&all[at]) != "%" {
        return None;
    }
    let (first, last) = (operand_before(tag, all, at)?, operand_after(tag, all, at)?);
    let is_literal = first + 1 == at && all[first].kind == Kind::Text;
    let is_tuple = text(&all[at + 1]) == "("
        && all[at + 1].partner == Some(last)
        && has_comma(tag, &all[at + 2..last]);
    (is_literal || is_tuple).then(|| {
        (
            all[first].text.start..all[at - 1].text.end,
            all[at].text.clone(),
            all[at + 1].text.start..all[last].text.end,
        )
    })
}

pub(super) fn has_comma(tag: &str, inner: &[Token]) -> bool {
    let mut depth = 0usize;
    inner.iter().any(|token| {
        match token.kind {
            Kind::Open => depth += 1,
            Kind::Close => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth == 0 && &tag[token.text.clone()] == ","
    })
}

/// Words before a bracket that do not make it a call.
pub(super) const KEYWORDS: [&str; 12] =
    ["in", "not", "and", "or", "if", "elif", "else", "is", "set", "for", "recursive", "call"];

/// The first token of the operand that ends before `at`.
fn operand_before(tag: &str, all: &[Token], at: usize) -> Option<usize> {
    let mut at = at.checked_sub(1)?;
    loop {
        match all[at].kind {
            Kind::Close => {
                at = all[at].partner?;
                let is_call = at.checked_sub(1).is_some_and(|before| match all[before].kind {
                    Kind::Word => !KEYWORDS.contains(&&tag[all[before].text.clone()]),
                    Kind::Close | Kind::Text => true,
                    _ => false,
                });
                if !is_call {
                    return Some(at);
                }
                at -= 1;
            }
            Kind::Word | Kind::Number | Kind::Text => {
                let after = at.checked_sub(1).map(|before| &tag[all[before].text.clone()]);
                match after {
                    Some("." | "|") => at = at.checked_sub(2)?,
                    _ => return Some(at),
                }
            }
            _ => return None,
        }
    }
}

/// The last token of the operand that begins after `at`.
fn operand_after(tag: &str, all: &[Token], at: usize) -> Option<usize> {
    let text = |at: usize| all.get(at).map(|token| &tag[token.text.clone()]);
    let mut at = at + 1;
    while matches!(text(at), Some("-" | "+")) {
        at += 1;
    }
    let mut last = match all.get(at)?.kind {
        Kind::Open => all[at].partner?,
        Kind::Word | Kind::Number | Kind::Text => at,
        _ => return None,
    };
    loop {
        match text(last + 1) {
            Some("." | "|") => last += 2,
            Some("(" | "[") => last = all[last + 1].partner?,
            _ => return (last < all.len()).then_some(last),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_blocks_become_scopes() {
        let source = "{%- generation -%}a{% endgeneration %}{%+ generation%}";
        assert_eq!(rewrite(source).unwrap(), "{%- with -%}a{% endwith %}{%+ with%}");
        for same in [
            "{% if add_generation_prompt %}",
            "{# {% generation %} #}",
            "{% raw %}{% generation %}{% endraw %}",
            "{{ '{% generation %}' }}",
            "{{ generation }}",
            "a { b {",
            "{{ 'ü\\",
        ] {
            assert_eq!(rewrite(same).unwrap(), same);
        }
    }

    #[test]
    fn formatting_becomes_a_call_and_arithmetic_stays() {
        for (source, expected) in [
            ("{{ '%s' % x }}", "{{ __percent__('%s' , x) }}"),
            ("{{ '%s %s' % (a, b) ~ c }}", "{{ __percent__('%s %s' , (a, b)) ~ c }}"),
            ("{{ f(1).g|trim % (a, b[1]) }}", "{{ __percent__(f(1).g|trim , (a, b[1])) }}"),
            ("{% if ('%d' % n|int) == x %}", "{% if (__percent__('%d' , n|int)) == x %}"),
            (
                "{{ '%s' % a + '%s' % (b,) }}",
                "{{ __percent__('%s' , a) + __percent__('%s' , (b,)) }}",
            ),
        ] {
            assert_eq!(rewrite(source).unwrap(), expected);
        }
        for same in ["{{ a % 2 == 0 }}", "{{ a % (b + 1) }}", "{%- if i % 2 %}", "{{ '%}' }}%}"] {
            assert_eq!(rewrite(same).unwrap(), same);
        }
    }
}
