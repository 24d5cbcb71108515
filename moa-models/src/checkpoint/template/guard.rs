//! Values that a template makes are bounded as they are made: a list that holds another one twice, again and again,
//! is small in memory and endless to print, to compare and to write as JSON, which the engine's budget does not count.

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, State, Value};

use super::rewrite::{KEYWORDS, Kind, Token, end_of_raw, has_comma, tokens};

/// The function that bounds a value.
pub(super) const OWN: &str = "__own__";
/// The function that bounds a value which becomes an attribute of a namespace.
pub(super) const ATTRIBUTE: &str = "__attribute__";

/// Most items of a value, those of its items included, each as often as it is there; a text counts one for every 64
/// bytes.
const MOST_ITEMS: usize = 1 << 20;
/// Deepest nesting.
const MOST_LEVELS: usize = 100;

/// Bounds a value.
pub(super) fn own(state: &State, value: Value) -> Result<Value, Error> {
    check(state, &value, false)?;
    Ok(value)
}

/// Bounds a value which becomes an attribute of a namespace: none that holds one, as it could be held by it.
pub(super) fn attribute(state: &State, value: Value) -> Result<Value, Error> {
    check(state, &value, true)?;
    Ok(value)
}

/// Checks that a value can be walked through as a whole.
pub(super) fn check(state: &State, value: &Value, is_attribute: bool) -> Result<(), Error> {
    let mut left = MOST_ITEMS;
    walk(value, is_attribute, 0, &mut left)?;
    state.consume_fuel(((MOST_ITEMS - left) / 64) as u64)
}

fn walk(value: &Value, is_attribute: bool, depth: usize, left: &mut usize) -> Result<(), Error> {
    let fault = |message: &'static str| Err(Error::new(ErrorKind::InvalidOperation, message));
    let cost = 1 + value.as_str().map_or(0, |text| text.len() / 64);
    match left.checked_sub(cost) {
        Some(rest) => *left = rest,
        None => return fault("a value is too large"),
    }
    let is_map = match value.kind() {
        ValueKind::Map => true,
        ValueKind::Seq => false,
        _ => return Ok(()),
    };
    if depth >= MOST_LEVELS {
        return fault("a value is nested too deeply, or holds itself");
    }
    if is_attribute && value.as_object().is_some_and(|o| o.type_name().ends_with("::Namespace")) {
        return fault("a namespace cannot be held by a namespace");
    }
    for item in value.try_iter()? {
        if is_map {
            walk(&value.get_item(&item)?, is_attribute, depth + 1, left)?;
        }
        walk(&item, is_attribute, depth + 1, left)?;
    }
    Ok(())
}

/// The same template, in which literal lists, mappings and tuples, and what is set, are bounded.
pub(super) fn guard(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find('{') {
        let (before, from) = rest.split_at(at);
        out.push_str(before);
        let len = match from.as_bytes().get(1) {
            Some(b'#') => from.find("#}").map_or(from.len(), |end| end + 2),
            Some(open @ (b'{' | b'%')) => {
                let (all, len) = tokens(from, if *open == b'{' { "}}" } else { "%}" });
                let is_raw = *open == b'%' && is_word(from, &all, 0, "raw");
                let len = if is_raw { end_of_raw(from, len) } else { len };
                if !is_raw {
                    push_guarded(&mut out, &from[..len], &all, *open == b'%');
                    rest = &from[len..];
                    continue;
                }
                len
            }
            _ => 1,
        };
        out.push_str(&from[..len]);
        rest = &from[len..];
    }
    out.push_str(rest);
    out
}

fn is_word(tag: &str, all: &[Token], at: usize, word: &str) -> bool {
    all.get(at).is_some_and(|token| &tag[token.text.clone()] == word)
}

fn push_guarded(out: &mut String, tag: &str, all: &[Token], is_block: bool) {
    // Texts to insert, by their place.
    let mut inserts: Vec<(usize, String)> = Vec::new();
    // Brackets among the names that a block assigns hold names.
    let assigns = |block: &str| is_block && is_word(tag, all, 0, block);
    let end = |word: &str| (1..all.len()).find(|at| is_word(tag, all, *at, word)).unwrap_or(0);
    let names = match () {
        () if assigns("for") => end("in"),
        () if assigns("set") => end("="),
        () => 0,
    };
    if assigns("with") {
        push_grown(&mut inserts, tag, &all[1..]);
    }
    for (at, token) in all.iter().enumerate() {
        let (Kind::Open, Some(partner)) = (token.kind, token.partner) else { continue };
        let inner = &all[at + 1..partner];
        if is_call(tag, all, at) {
            push_grown(&mut inserts, tag, inner);
        }
        let is_tuple = &tag[token.text.clone()] == "(";
        if !begins_value(tag, all, at, is_block)
            || (is_tuple && (at < names || !has_comma(tag, inner)))
        {
            continue;
        }
        inserts.push((token.text.start, format!("{OWN}(")));
        inserts.push((all[partner].text.end, ")".to_owned()));
    }
    let assigned = |at: &usize| all[*at].kind == Kind::Operator && is_word(tag, all, *at, "=");
    if is_block
        && is_word(tag, all, 0, "set")
        && let Some(equal) = (1..all.len()).find(assigned)
        && let (Some(first), Some(last)) = (all.get(equal + 1), all.last())
    {
        let is_attribute = all[1..equal].iter().any(|token| &tag[token.text.clone()] == ".");
        let name = if is_attribute { ATTRIBUTE } else { OWN };
        let (open, close) =
            if has_comma(tag, &all[equal + 1..]) { ("((", "))") } else { ("(", ")") };
        inserts.insert(0, (first.text.start, format!("{name}{open}")));
        inserts.push((last.text.end, close.to_owned()));
    }
    // The order of inserts at one place is that of their making.
    inserts.sort_by_key(|(place, _)| *place);
    let mut from = 0;
    for (place, text) in inserts {
        out.push_str(&tag[from..place]);
        out.push_str(&text);
        from = place;
    }
    out.push_str(&tag[from..]);
}

/// Bounds those of some arguments, `name = value` or a value, that are made by an operator which joins lists: a macro that
/// calls itself with `x + x` doubles a list without a literal.
fn push_grown(inserts: &mut Vec<(usize, String)>, tag: &str, arguments: &[Token]) {
    let text = |token: &Token| &tag[token.text.clone()];
    let mut depth = 0usize;
    let separates = |token: &Token| {
        match token.kind {
            Kind::Open => depth += 1,
            Kind::Close => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth == 0 && text(token) == ","
    };
    for argument in arguments.split(separates) {
        let is_named = argument.get(1).is_some_and(|token| text(token) == "=");
        let value = &argument[if is_named { 2 } else { 0 }..];
        let grows =
            |token: &Token| token.kind == Kind::Operator && matches!(text(token), "+" | "*");
        if let (Some(first), Some(last), true) =
            (value.first(), value.last(), value.iter().any(grows))
        {
            inserts.push((first.text.start, format!("{OWN}(")));
            inserts.push((last.text.end, ")".to_owned()));
        }
    }
}

/// Whether a bracket opens the arguments of a call.
fn is_call(tag: &str, all: &[Token], at: usize) -> bool {
    let is_callee = |before: &Token| match before.kind {
        Kind::Word => !KEYWORDS.contains(&&tag[before.text.clone()]),
        Kind::Close => true,
        _ => false,
    };
    &tag[all[at].text.clone()] == "(" && at.checked_sub(1).is_some_and(|at| is_callee(&all[at]))
}

/// Whether a bracket opens a literal, and neither a call, an index nor a list of names.
fn begins_value(tag: &str, all: &[Token], at: usize, is_block: bool) -> bool {
    let Some(before) = at.checked_sub(1) else { return !is_block };
    let text = &tag[all[before].text.clone()];
    match all[before].kind {
        Kind::Word => {
            KEYWORDS.contains(&text) && !matches!(text, "set" | "for" | "call" | "recursive")
        }
        Kind::Operator => text != ".",
        Kind::Open => true,
        Kind::Close | Kind::Text | Kind::Number => false,
    }
}

#[cfg(test)]
mod tests {
    use super::guard;

    #[test]
    fn literals_and_what_is_set_are_bounded() {
        for (source, expected) in [
            ("{{ [x, x] }}", "{{ __own__([x, x]) }}"),
            (
                "{{ f([x])[0]({'a': (b, c)}) }}",
                "{{ f(__own__([x]))[0](__own__({'a': __own__((b, c))})) }}",
            ),
            ("{% set x = a[0] + [1] %}", "{% set x = __own__(a[0] + __own__([1])) %}"),
            ("{%- set ns.x = y -%}", "{%- set ns.x = __attribute__(y) -%}"),
            ("{% set a, b = 1, [2] %}", "{% set a, b = __own__((1, __own__([2]))) %}"),
            ("{% for a, b in [(1, 2)] %}", "{% for a, b in __own__([__own__((1, 2))]) %}"),
            ("{% set a, (b, c) = d %}", "{% set a, (b, c) = __own__(d) %}"),
            ("{% with a = x + x, b = y %}", "{% with a = __own__(x + x), b = y %}"),
            (
                "{{ f(x + x, n - 1, k=(y * 2)) }}",
                "{{ f(__own__(x + x), n - 1, k=__own__((y * 2))) }}",
            ),
            ("{{ f([x] + [x]) }}", "{{ f(__own__(__own__([x]) + __own__([x]))) }}"),
            ("{% if x in ['a'] and y == z %}", "{% if x in __own__(['a']) and y == z %}"),
        ] {
            assert_eq!(guard(source), expected);
        }
        for same in [
            "{{ x[1:] }}",
            "{{ (a + b) * c }}",
            "{% set x %}[1]{% endset %}",
            "{% for (a, b) in c %}",
            "{% for a, (b, c) in d %}",
            "{% for (a, (b, c)) in d %}",
            "{% macro f(a, b) %}",
            "{# [1] #}{% raw %}{{ [1] }}{% endraw %}",
            "{{ '[1]' }} { [",
        ] {
            assert_eq!(guard(same), same);
        }
    }
}
