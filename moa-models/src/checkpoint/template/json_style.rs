//! `json.dumps` of Python.

use std::io::{self, Write};

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};
use serde::Serialize;
use serde_json::ser::{CharEscape, Formatter, Serializer};

use super::python::{float, sorted};

/// The filter `tojson`, as transformers has it: `json.dumps(value, ensure_ascii=False)` with other
/// arguments on request. (minijinja's own escapes HTML.)
pub(super) fn tojson(state: &State, value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent = match kwargs.get::<Option<Value>>("indent")? {
        None => None,
        Some(value) if value.is_none() => None,
        Some(value) => Some(match value.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(value.as_usize().unwrap_or(0).min(64)),
        }),
    };
    let separators = kwargs.get::<Option<Vec<String>>>("separators")?;
    let [item, key] = match separators.as_deref() {
        Some([item, key]) => [item.clone(), key.clone()],
        None => [if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()],
        Some(_) => {
            let message = "separators are two texts: between items, and after a key";
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
    };
    let ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let is_sorted = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let value = if is_sorted { sorted(state, value, 0)? } else { value.clone() };
    // What is undefined is no JSON in Python either.
    if value.kind() == ValueKind::Undefined {
        return Err(Error::new(ErrorKind::BadSerialization, "an undefined value is not JSON"));
    }
    let mut out = Paid { state, bytes: Vec::new(), paid: 0 };
    let style = Style { indent, item, key, ascii, depth: 0, has_item: false };
    value.serialize(&mut Serializer::with_formatter(&mut out, style)).map_err(|e| {
        match out.pay(COST) {
            // The text became too long.
            Err(no_fuel) => no_fuel,
            Ok(()) => {
                let message = "the value cannot be written as JSON";
                Error::new(ErrorKind::BadSerialization, message).with_source(e)
            }
        }
    })?;
    Ok(String::from_utf8_lossy(&out.bytes).into_owned())
}

/// Bytes for a unit of fuel; they come in small pieces, which take longer than a text in one.
const COST: usize = 8;

/// Bytes that are paid for as they come: a value may hold another one many times.
struct Paid<'a, 's, 't> {
    state: &'a State<'s, 't>,
    bytes: Vec<u8>,
    paid: usize,
}

impl Paid<'_, '_, '_> {
    fn pay(&mut self, more: usize) -> Result<(), Error> {
        let due = (self.bytes.len() + more).saturating_sub(self.paid);
        if due >= COST {
            self.paid += due / COST * COST;
            self.state.consume_fuel((due / COST) as u64)?;
        }
        Ok(())
    }
}

impl Write for Paid<'_, '_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.pay(bytes.len()).map_err(io::Error::other)?;
        self.bytes.extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// How the text looks.
struct Style {
    /// What a nested line begins with, for each level; `None` for one line.
    indent: Option<String>,
    /// Between two items.
    item: String,
    /// Between a key and its value.
    key: String,
    /// Other characters are written as escapes.
    ascii: bool,
    depth: usize,
    has_item: bool,
}

impl Style {
    fn open<W: ?Sized + Write>(&mut self, w: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.has_item = false;
        w.write_all(bracket)
    }

    fn close<W: ?Sized + Write>(&mut self, w: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if self.has_item {
            self.line(w)?;
        }
        self.has_item = true;
        w.write_all(bracket)
    }

    fn line<W: ?Sized + Write>(&self, w: &mut W) -> io::Result<()> {
        let Some(indent) = &self.indent else { return Ok(()) };
        w.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| w.write_all(indent.as_bytes()))
    }

    fn begin<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        if !first {
            w.write_all(self.item.as_bytes())?;
        }
        self.has_item = true;
        self.line(w)
    }
}

impl Formatter for Style {
    fn begin_array<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.open(w, b"[")
    }

    fn end_array<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.close(w, b"]")
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.begin(w, first)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.open(w, b"{")
    }

    fn end_object<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        self.close(w, b"}")
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.begin(w, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(self.key.as_bytes())
    }

    fn write_f64<W: ?Sized + Write>(&mut self, w: &mut W, number: f64) -> io::Result<()> {
        w.write_all(float(number).as_bytes())
    }

    fn write_string_fragment<W: ?Sized + Write>(
        &mut self,
        w: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        if !self.ascii {
            return w.write_all(fragment.as_bytes());
        }
        for c in fragment.chars() {
            if matches!(c, ' '..='~') {
                w.write_all(&[c as u8])?;
                continue;
            }
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(w, "\\u{unit:04x}")?;
            }
        }
        Ok(())
    }

    fn write_char_escape<W: ?Sized + Write>(
        &mut self,
        w: &mut W,
        escape: CharEscape,
    ) -> io::Result<()> {
        match escape {
            CharEscape::Quote => w.write_all(b"\\\""),
            CharEscape::ReverseSolidus => w.write_all(b"\\\\"),
            CharEscape::Solidus => w.write_all(b"/"),
            CharEscape::Backspace => w.write_all(b"\\b"),
            CharEscape::FormFeed => w.write_all(b"\\f"),
            CharEscape::LineFeed => w.write_all(b"\\n"),
            CharEscape::CarriageReturn => w.write_all(b"\\r"),
            CharEscape::Tab => w.write_all(b"\\t"),
            CharEscape::AsciiControl(byte) => write!(w, "\\u{byte:04x}"),
        }
    }
}
