use std::fmt::{Display, Write};

use super::palette::{Tone, on_shade, shade};

/// Font size of everything but panel titles, in pixels.
const FONT: f64 = 12.0;

/// A drawing of fixed size, at most as wide as a phone shows without scaling where that is possible.
///
/// Shapes carry the colours of the light theme as attributes, so that the drawing shows in any
/// viewer, and a class by which a page gives them the colours of its theme.
#[derive(Clone, Debug)]
pub(crate) struct Panel {
    pub(crate) width: f64,
    pub(crate) height: f64,
    /// What the panel shows, for readers who do not see it.
    pub(crate) label: String,
    body: String,
}

/// Which end of a text its place is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Anchor {
    Start,
    Middle,
    End,
}

/// A mark of a scatter plot; series differ in shape as well as colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mark {
    Circle,
    Diamond,
    /// A circle around another mark.
    Ring,
}

impl Panel {
    pub(crate) fn new(width: f64, height: f64, label: impl Into<String>) -> Self {
        Self { width, height, label: label.into(), body: String::new() }
    }

    /// A rectangle of one tone; `tip` shows when it is pointed at.
    pub(crate) fn rect(&mut self, (x, y): (f64, f64), (w, h): (f64, f64), tone: Tone, tip: &str) {
        let fill = format!("class=\"f-{}\" fill=\"{}\"", tone.name(), tone.hex());
        self.shape(
            &format!("rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{h:.1}\" {fill}"),
            "rect",
            tip,
        );
    }

    /// A cell of a sequential scale.
    pub(crate) fn cell(&mut self, (x, y): (f64, f64), (w, h): (f64, f64), share: f64, tip: &str) {
        let percent = 100.0 * share.clamp(0.0, 1.0);
        let fill = format!("class=\"cell\" style=\"--v:{percent:.1}%\" fill=\"{}\"", shade(share));
        self.shape(
            &format!("rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{h:.1}\" {fill}"),
            "rect",
            tip,
        );
    }

    /// An empty cell.
    pub(crate) fn frame(&mut self, (x, y): (f64, f64), (w, h): (f64, f64), tip: &str) {
        let stroke = format!("class=\"s-line\" fill=\"none\" stroke=\"{}\"", Tone::Line.hex());
        self.shape(
            &format!("rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{w:.1}\" height=\"{h:.1}\" {stroke}"),
            "rect",
            tip,
        );
    }

    /// A straight line.
    pub(crate) fn line(&mut self, (x1, y1): (f64, f64), (x2, y2): (f64, f64), tone: Tone) {
        let _ = writeln!(
            self.body,
            "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" class=\"s-{}\" stroke=\"{}\"/>",
            tone.name(),
            tone.hex(),
        );
    }

    /// A mark with its middle at a place.
    pub(crate) fn mark(&mut self, (x, y): (f64, f64), mark: Mark, tone: Tone, tip: &str) {
        let (name, hex) = (tone.name(), tone.hex());
        match mark {
            Mark::Circle => {
                let head = format!(
                    "circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4.5\" class=\"f-{name}\" fill=\"{hex}\""
                );
                self.shape(&head, "circle", tip);
            }
            Mark::Diamond => {
                let head = format!(
                    "path d=\"M{x:.1} {:.1}l5.5 5.5l-5.5 5.5l-5.5 -5.5z\" class=\"f-{name}\" fill=\"{hex}\"",
                    y - 5.5
                );
                self.shape(&head, "path", tip);
            }
            Mark::Ring => {
                let head = format!(
                    "circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"8.5\" class=\"s-{name}\" fill=\"none\" \
                     stroke=\"{hex}\" stroke-width=\"2\""
                );
                self.shape(&head, "circle", tip);
            }
        }
    }

    /// Text with its baseline at a place.
    pub(crate) fn text(&mut self, at: (f64, f64), anchor: Anchor, tone: Tone, text: impl Display) {
        self.sized_text(at, anchor, tone, FONT, false, text);
    }

    /// The panel's heading, at its upper left.
    pub(crate) fn heading(&mut self, text: impl Display) {
        self.sized_text((0.0, 14.0), Anchor::Start, Tone::Ink, 13.0, true, text);
    }

    /// Text on a cell of that share.
    pub(crate) fn cell_text(&mut self, (x, y): (f64, f64), share: f64, text: impl Display) {
        self.sized_text((x, y + 4.0), Anchor::Middle, on_shade(share), FONT, false, text);
    }

    fn sized_text(
        &mut self,
        (x, y): (f64, f64),
        anchor: Anchor,
        tone: Tone,
        size: f64,
        bold: bool,
        text: impl Display,
    ) {
        let anchor = match anchor {
            Anchor::Start => "",
            Anchor::Middle => " text-anchor=\"middle\"",
            Anchor::End => " text-anchor=\"end\"",
        };
        let bold = if bold { " font-weight=\"bold\"" } else { "" };
        let _ = writeln!(
            self.body,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\"{anchor}{bold} class=\"f-{}\" fill=\"{}\">{}</text>",
            tone.name(),
            tone.hex(),
            escape(&text.to_string()),
        );
    }

    fn shape(&mut self, head: &str, name: &str, tip: &str) {
        let _ = match tip {
            "" => writeln!(self.body, "<{head}/>"),
            tip => writeln!(self.body, "<{head}><title>{}</title></{name}>", escape(tip)),
        };
    }

    /// The panel as part of another drawing.
    pub(super) fn group(&self, (x, y): (f64, f64)) -> String {
        format!("<g transform=\"translate({x:.1} {y:.1})\">\n{}</g>\n", self.body)
    }

    /// The panel as an element of a page.
    pub(super) fn inline(&self) -> String {
        format!(
            "<svg role=\"img\" aria-label=\"{}\" width=\"{:.0}\" height=\"{:.0}\" viewBox=\"0 0 {:.0} {:.0}\" \
             font-family=\"system-ui, sans-serif\">\n{}</svg>\n",
            escape(&self.label),
            self.width,
            self.height,
            self.width,
            self.height,
            self.body
        )
    }
}

/// Text with the characters that mean something in HTML and SVG replaced, for content and quoted
/// attributes. Control characters, which no XML may hold, become spaces.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\u{fffe}' | '\u{ffff}' => out.push(' '),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_a_user_cannot_leave_its_place() {
        let mut panel = Panel::new(10.0, 10.0, "\"><script>");
        panel.text((0.0, 0.0), Anchor::Start, Tone::Ink, "</text><script>\u{0}&");
        panel.rect((0.0, 0.0), (1.0, 1.0), Tone::First, "a' b\" <c>");
        let svg = panel.inline();
        assert!(!svg.contains("<script>") && !svg.contains('\u{0}'), "{svg}");
        assert!(svg.contains("&lt;/text&gt;&lt;script&gt; &amp;"), "{svg}");
        assert!(svg.contains("<title>a&#39; b&quot; &lt;c&gt;</title>"), "{svg}");
    }

    #[test]
    fn shapes_have_a_colour_and_a_class() {
        let mut panel = Panel::new(10.0, 10.0, "");
        panel.cell((0.0, 0.0), (5.0, 5.0), 1.0, "");
        panel.line((0.0, 0.0), (1.0, 1.0), Tone::Line);
        panel.mark((0.0, 0.0), Mark::Diamond, Tone::Second, "");
        let svg = panel.inline();
        for line in svg.lines().filter(|l| l.starts_with('<') && !l.contains("svg")) {
            assert!(line.contains("class=\"") && line.contains("=\"#"), "{line}");
        }
    }
}
