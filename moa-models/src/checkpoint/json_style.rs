use std::io;

use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter, Serializer};

/// `value` as Python's `json.dumps(value, ensure_ascii=False, indent=indent)` writes it.
pub(crate) fn python_json(
    value: &impl Serialize,
    indent: Option<usize>,
) -> serde_json::Result<String> {
    let mut out = Vec::new();
    match indent {
        None => value.serialize(&mut Serializer::with_formatter(&mut out, Spaced))?,
        Some(width) => {
            let spaces = " ".repeat(width.min(16));
            let formatter = PrettyFormatter::with_indent(spaces.as_bytes());
            value.serialize(&mut Serializer::with_formatter(&mut out, formatter))?;
        }
    }
    Ok(String::from_utf8_lossy(&out).into_owned())
}

/// One line with a space after each comma and colon.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        w.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spaces_as_in_python() -> serde_json::Result<()> {
        let value: serde_json::Value = serde_json::from_str(r#"{"a":[1,"<b>"],"c":{}}"#)?;
        assert_eq!(python_json(&value, None)?, r#"{"a": [1, "<b>"], "c": {}}"#);
        let pretty = "{\n  \"a\": [\n    1,\n    \"<b>\"\n  ],\n  \"c\": {}\n}";
        assert_eq!(python_json(&value, Some(2))?, pretty);
        Ok(())
    }
}
