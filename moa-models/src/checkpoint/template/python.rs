//! Methods, filters and tests of Python and Jinja2 that the template engine lacks.

use minijinja::value::{Kwargs, Rest, Tuple, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value, escape_formatter};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::rewrite::PERCENT;

type Result<T> = std::result::Result<T, Error>;

pub(super) fn add(environment: &mut Environment<'_>) {
    environment.set_unknown_method_callback(method);
    environment.set_formatter(write);
    environment.add_function(PERCENT, percent);
    environment
        .add_function("cycler", |items: Rest<Value>| minijinja_contrib::globals::cycler(items.0));
    environment.add_function("joiner", minijinja_contrib::globals::joiner);
    environment.add_filter("wordcount", |text: &str| {
        text.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|w| !w.is_empty()).count()
    });
    environment.add_filter("urlencode", urlencode);
    environment.add_filter("pprint", pprint);
    environment.add_filter("center", |state: &State, text: &str, width: Option<usize>| {
        padded(state, text, width.unwrap_or(80), ' ', Side::Both)
    });
    environment.add_filter("truncate", truncate);
    environment.add_filter("indent", indent);
    environment.add_filter("striptags", minijinja_contrib::filters::striptags);
    environment.add_filter("filesizeformat", minijinja_contrib::filters::filesizeformat);
    environment.add_test("callable", |value: &Value| {
        // What can be called is neither a number, a text, a sequence nor a mapping; a macro shows its
        // attributes as a mapping does.
        let is_macro = || value.as_object().is_some_and(|o| o.type_name().ends_with("::Macro"));
        value.is_undefined() || value.kind() == ValueKind::Plain || is_macro()
    });
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("sequence", |value: &Value| {
        let kinds = [ValueKind::Undefined, ValueKind::String, ValueKind::Seq, ValueKind::Map];
        kinds.contains(&value.kind())
    });
}

/// Numbers as Python writes them, everything else as it is.
pub(super) fn write(out: &mut Output<'_>, state: &mut State, value: &Value) -> Result<()> {
    match value.kind() {
        ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
            Ok(number) => Ok(out.write_str(&float(number))?),
            Err(error) => Err(error),
        },
        ValueKind::Map | ValueKind::Seq => {
            super::guard::check(state, value, false)?;
            escape_formatter(out, state, value)
        }
        _ => escape_formatter(out, state, value),
    }
}

/// `repr` of a float: with an exponent below 1e-4 and from 1e16 on.
pub(super) fn float(number: f64) -> String {
    if !number.is_finite() {
        return match number {
            _ if number.is_nan() => "nan".to_owned(),
            _ if number > 0.0 => "inf".to_owned(),
            _ => "-inf".to_owned(),
        };
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>().unwrap_or(0) {
        -4..=15 => format!("{number:?}"),
        exponent => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
    }
}

fn fault(message: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.to_owned())
}

/// Pays for a text before it is made, as the engine does: one unit for 64 bytes.
fn pay(state: &State, bytes: usize) -> Result<()> {
    state.consume_fuel((bytes / 64) as u64)
}

/// `format % values`, where the values are a tuple, or one value alone.
fn percent(state: &mut State, format: &str, values: Value) -> Result<Value> {
    let mut args = vec![Value::from(format)];
    match values.downcast_object_ref::<Tuple>() {
        Some(tuple) => args.extend(tuple.iter().cloned()),
        None => args.push(values),
    }
    state.apply_filter("format", &args)
}

fn method(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value> {
    let own = match value.kind() {
        ValueKind::String => match value.as_str() {
            Some(text) => text_method(state, text, method, args)?,
            None => None,
        },
        ValueKind::Seq => sequence_method(value, method, args)?,
        ValueKind::Map if method == "copy" => {
            let () = from_args(args)?;
            Some(value.clone())
        }
        _ => None,
    };
    match own {
        Some(own) => Ok(own),
        None => unknown_method_callback(state, value, method, args),
    }
}

fn sequence_method(value: &Value, method: &str, args: &[Value]) -> Result<Option<Value>> {
    Ok(match method {
        "copy" => {
            let () = from_args(args)?;
            Some(value.clone())
        }
        "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let at = value.try_iter()?.position(|item| item == *wanted);
            Some(at.ok_or_else(|| fault("the value is not in the list"))?.into())
        }
        _ => None,
    })
}

fn text_method(state: &State, s: &str, method: &str, args: &[Value]) -> Result<Option<Value>> {
    let all = |belongs: fn(char) -> bool| -> Result<Value> {
        let () = from_args(args)?;
        Ok(Value::from(!s.is_empty() && s.chars().all(belongs)))
    };
    let pad = |side: Side| -> Result<Value> {
        let (width, fill): (usize, Option<char>) = from_args(args)?;
        padded(state, s, width, fill.unwrap_or(' '), side).map(Value::from)
    };
    let found = |at: Option<usize>| match at {
        Some(at) => Ok(Value::from(s[..at].chars().count())),
        None => Err(fault("substring not found")),
    };
    Ok(Some(match method {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            s.strip_prefix(prefix).unwrap_or(s).into()
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            s.strip_suffix(suffix).unwrap_or(s).into()
        }
        "ljust" => pad(Side::Right)?,
        "rjust" => pad(Side::Left)?,
        "center" => pad(Side::Both)?,
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = s.split_at(usize::from(s.starts_with(['+', '-'])));
            let width = width.saturating_sub(sign.len());
            format!("{sign}{}", padded(state, digits, width, '0', Side::Left)?).into()
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            if separator.is_empty() {
                return Err(fault("empty separator"));
            }
            let is_last = method == "rpartition";
            let parts = if is_last { s.rsplit_once(separator) } else { s.split_once(separator) };
            let [a, b, c] = match parts {
                Some((before, after)) => [before, separator, after],
                None if is_last => ["", "", s],
                None => [s, "", ""],
            };
            Value::from_object(Tuple::new(vec![a.into(), b.into(), c.into()]))
        }
        "rsplit" => {
            let (separator, most): (Option<&str>, Option<i64>) = from_args(args)?;
            let most = most.and_then(|most| usize::try_from(most).ok());
            rsplit(s, separator, most)?.into_iter().map(Value::from).collect()
        }
        "splitlines" => {
            let (keep,): (Option<bool>,) = from_args(args)?;
            split_lines(s, keep.unwrap_or(false)).into_iter().map(Value::from).collect()
        }
        "index" => {
            let (what,): (&str,) = from_args(args)?;
            found(s.find(what))?
        }
        "rindex" => {
            let (what,): (&str,) = from_args(args)?;
            found(s.rfind(what))?
        }
        "casefold" => {
            let () = from_args(args)?;
            s.to_lowercase().replace('ß', "ss").into()
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swap = |c: char| -> String {
                if c.is_uppercase() {
                    c.to_lowercase().collect()
                } else {
                    c.to_uppercase().collect()
                }
            };
            s.chars().map(swap).collect::<String>().into()
        }
        "expandtabs" => {
            let (size,): (Option<usize>,) = from_args(args)?;
            expand_tabs(state, s, size.unwrap_or(8))?.into()
        }
        "isdecimal" => all(|c| c.is_ascii_digit())?,
        "isprintable" => {
            let () = from_args(args)?;
            Value::from(!s.chars().any(char::is_control))
        }
        "isidentifier" => {
            let () = from_args(args)?;
            let begins = s.chars().next().is_some_and(|c| c.is_alphabetic() || c == '_');
            Value::from(begins && s.chars().all(|c| c.is_alphanumeric() || c == '_'))
        }
        "istitle" => {
            let () = from_args(args)?;
            Value::from(is_title(s))
        }
        _ => return Ok(None),
    }))
}

#[derive(Clone, Copy)]
enum Side {
    Left,
    Right,
    Both,
}

/// A text of at least `width` characters, with `fill` at one side or both.
fn padded(state: &State, s: &str, width: usize, fill: char, side: Side) -> Result<String> {
    let len = s.chars().count();
    let missing = width.saturating_sub(len);
    pay(state, missing.saturating_mul(4))?;
    let left = match side {
        Side::Left => missing,
        Side::Right => 0,
        // Python's: the odd one goes to the left where the width is odd.
        Side::Both => missing / 2 + (missing & width & 1),
    };
    let fills = |count: usize| std::iter::repeat_n(fill, count);
    Ok(fills(left).chain(s.chars()).chain(fills(missing - left)).collect())
}

fn rsplit<'s>(s: &'s str, separator: Option<&str>, most: Option<usize>) -> Result<Vec<&'s str>> {
    let pieces = most.map_or(usize::MAX, |most| most.saturating_add(1));
    let mut parts: Vec<&str> = match separator {
        Some("") => return Err(fault("empty separator")),
        Some(separator) => s.rsplitn(pieces, separator).collect(),
        None => {
            let (mut parts, mut rest) = (Vec::new(), s.trim_end());
            while !rest.is_empty() {
                let cut = rest.rfind(char::is_whitespace).filter(|_| parts.len() + 1 < pieces);
                let begin =
                    cut.map_or(0, |at| at + rest[at..].chars().next().map_or(0, char::len_utf8));
                parts.push(if cut.is_none() { rest.trim_start() } else { &rest[begin..] });
                rest = cut.map_or("", |at| rest[..at].trim_end());
            }
            parts
        }
    };
    parts.reverse();
    Ok(parts)
}

/// Lines as Python's `str.splitlines` cuts them.
fn split_lines(s: &str, keep_ends: bool) -> Vec<&str> {
    const ENDS: [char; 10] = [
        '\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}',
        '\u{2029}',
    ];
    let (mut lines, mut rest) = (Vec::new(), s);
    while let Some(at) = rest.find(ENDS) {
        let end = match rest[at..].starts_with("\r\n") {
            true => at + 2,
            false => at + rest[at..].chars().next().map_or(1, char::len_utf8),
        };
        lines.push(&rest[..if keep_ends { end } else { at }]);
        rest = &rest[end..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

fn expand_tabs(state: &State, s: &str, size: usize) -> Result<String> {
    pay(state, s.matches('\t').count().saturating_mul(size))?;
    let (mut out, mut column) = (String::new(), 0);
    for c in s.chars() {
        match c {
            '\t' if size == 0 => {}
            '\t' => {
                let spaces = size - column % size;
                out.extend(std::iter::repeat_n(' ', spaces));
                column += spaces;
            }
            '\n' | '\r' => {
                out.push(c);
                column = 0;
            }
            other => {
                out.push(other);
                column += 1;
            }
        }
    }
    Ok(out)
}

fn is_title(s: &str) -> bool {
    let (mut cased, mut previous) = (false, false);
    for c in s.chars() {
        if c.is_uppercase() && previous || c.is_lowercase() && !previous {
            return false;
        }
        previous = c.is_uppercase() || c.is_lowercase();
        cased |= previous;
    }
    cased
}

/// Jinja2's `truncate(length=255, killwords=False, end='...', leeway=5)`.
fn truncate(text: &str, args: Rest<Value>, kwargs: Kwargs) -> Result<String> {
    let given = |at: usize, name: &str| -> Result<Option<Value>> {
        Ok(args.0.get(at).cloned().or(kwargs.get(name)?).filter(|v| !v.is_none()))
    };
    let count = |value: Option<Value>, default| match value {
        None => Ok(default),
        Some(value) => usize::try_from(value),
    };
    let length = count(given(0, "length")?, 255)?;
    let cuts_words = given(1, "killwords")?.is_some_and(|value| value.is_true());
    let end = given(2, "end")?.map_or("...".to_owned(), |value| value.to_string());
    let leeway = count(given(3, "leeway")?, 5)?;
    kwargs.assert_all_used()?;
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text.to_owned());
    }
    let room = length.saturating_sub(end.chars().count());
    let cut: String = text.chars().take(room).collect();
    let whole_words =
        if cuts_words { &cut } else { cut.rsplit_once(' ').map_or(&*cut, |(w, _)| w) };
    Ok(format!("{whole_words}{end}"))
}

/// Jinja2's `indent(width=4, first=False, blank=False)`, whose width may be a text.
fn indent(state: &State, text: &str, args: Rest<Value>, kwargs: Kwargs) -> Result<String> {
    let given = |at: usize, name: &str| -> Result<Option<Value>> {
        Ok(args.0.get(at).cloned().or(kwargs.get(name)?))
    };
    let by = match given(0, "width")? {
        None => " ".repeat(4),
        Some(width) => match width.as_str() {
            Some(text) => text.to_owned(),
            None => {
                let width = usize::try_from(width)?;
                pay(state, width)?;
                " ".repeat(width)
            }
        },
    };
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let (first, blank) = (is_true(given(1, "first")?), is_true(given(2, "blank")?));
    kwargs.assert_all_used()?;
    let text = format!("{text}\n");
    let lines = split_lines(&text, false);
    pay(state, lines.len().saturating_mul(by.len()))?;
    let mut out = String::new();
    for (number, line) in lines.into_iter().enumerate() {
        if number > 0 {
            out.push('\n');
        }
        if (number > 0 && (blank || !line.is_empty())) || (number == 0 && first) {
            out.push_str(&by);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// `urllib.parse.quote` of a text; of pairs, a query string.
fn urlencode(value: &Value) -> Result<String> {
    let pair = |key: &Value, value: &Value| {
        format!("{}={}", quote(&key.to_string(), true), quote(&value.to_string(), true))
    };
    Ok(match value.kind() {
        ValueKind::Map => {
            let pairs = value.try_iter()?.map(|key| Ok(pair(&key, &value.get_item(&key)?)));
            pairs.collect::<Result<Vec<_>>>()?.join("&")
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let pairs = value
                .try_iter()?
                .map(|item| Ok(pair(&item.get_item_by_index(0)?, &item.get_item_by_index(1)?)));
            pairs.collect::<Result<Vec<_>>>()?.join("&")
        }
        _ => quote(&value.to_string(), false),
    })
}

fn quote(text: &str, is_query: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for &byte in text.as_bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => {
                out.push(byte.into());
            }
            b'/' if !is_query => out.push('/'),
            b' ' if is_query => out.push('+'),
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// `pprint.pformat`: one line where it fits into 80 columns, else an item a line; keys are sorted.
fn pprint(state: &State, value: &Value) -> Result<String> {
    let mut out = String::new();
    print(state, &sorted(state, value, 0)?, 0, 0, &mut out)?;
    Ok(out)
}

fn print(
    state: &State,
    value: &Value,
    indent: usize,
    after: usize,
    out: &mut String,
) -> Result<()> {
    // The engine's own text, which it pays for.
    let line = format!("{value:?}");
    pay(state, line.len())?;
    let (open, close) = match value.kind() {
        ValueKind::Map => ('{', '}'),
        ValueKind::Seq if value.downcast_object_ref::<Tuple>().is_some() => ('(', ')'),
        ValueKind::Seq => ('[', ']'),
        _ => (' ', ' '),
    };
    if open == ' ' || line.chars().count() + indent + after <= 80 {
        out.push_str(&line);
        return Ok(());
    }
    out.push(open);
    let items: Vec<Value> = value.try_iter()?.collect();
    for (number, item) in items.iter().enumerate() {
        let is_last = number + 1 == items.len();
        let after = if is_last { after + 1 } else { 1 };
        match value.kind() {
            ValueKind::Map => {
                let key = format!("{item:?}: ");
                out.push_str(&key);
                let indent = indent + 1 + key.chars().count();
                print(state, &value.get_item(item)?, indent, after, out)?;
            }
            _ => print(state, item, indent + 1, after, out)?,
        }
        if !is_last {
            out.push_str(",\n");
            pay(state, indent)?;
            out.extend(std::iter::repeat_n(' ', indent + 1));
        }
    }
    out.push(close);
    Ok(())
}

/// The same value, the keys of its mappings in order.
pub(super) fn sorted(state: &State, value: &Value, depth: usize) -> Result<Value> {
    state.consume_fuel(1)?;
    if depth > 200 {
        return Err(fault("the value is nested too deeply"));
    }
    match value.kind() {
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            keys.sort();
            let pairs = keys.into_iter().map(|key| {
                let own = sorted(state, &value.get_item(&key)?, depth + 1)?;
                Ok((key, own))
            });
            pairs.collect::<Result<Vec<_>>>().map(Value::from_pairs)
        }
        ValueKind::Seq => {
            let items = value.try_iter()?.map(|item| sorted(state, &item, depth + 1));
            let items: Vec<Value> = items.collect::<Result<_>>()?;
            Ok(match value.downcast_object_ref::<Tuple>() {
                Some(_) => Value::from_object(Tuple::new(items)),
                None => Value::from(items),
            })
        }
        _ => Ok(value.clone()),
    }
}
