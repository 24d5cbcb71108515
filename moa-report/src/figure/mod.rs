//! Figures of plans and measurements as plain SVG, alone or inside a page.

mod axis;
mod head_map;
mod kv_bytes;
mod palette;
mod panel;
mod pareto;
mod plot;
mod retrieval;
mod trials;

pub use head_map::head_map;
pub use kv_bytes::{Bars, kv_bytes};
pub(crate) use palette::{Tone, hex};
pub(crate) use panel::{Panel, escape};
pub use pareto::pareto;
pub use retrieval::retrieval;
pub use trials::trials;

use std::fmt::Write;

/// Width at which the panels of a picture that stands alone begin a new row.
const ALONE: f64 = 1080.0;
const MARGIN: f64 = 16.0;
const GAP: f64 = 28.0;

/// Panels that belong together, with a title and what is to be known to read them.
#[derive(Clone, Debug)]
pub struct Figure {
    /// File name and anchor: letters, digits and dashes.
    pub id: String,
    /// Heading.
    pub title: String,
    /// What is to be known to read the figure.
    pub caption: String,
    /// Panels, by rows that belong together; a row is broken where the page is narrow.
    pub(crate) rows: Vec<Vec<Panel>>,
    pub(crate) legend: Option<Panel>,
}

impl Figure {
    /// A file of its own, in the light theme.
    pub fn svg(&self) -> String {
        let mut body = String::new();
        let (mut y, mut right) = (44.0, 420.0f64);
        for (index, row) in self.rows.iter().enumerate() {
            let (mut x, mut height) = (MARGIN, 0.0f64);
            y += if index == 0 { 0.0 } else { GAP };
            for panel in row {
                if x > MARGIN && x + panel.width > ALONE {
                    (x, y, height) = (MARGIN, y + height + GAP, 0.0);
                }
                body.push_str(&panel.group((x, y)));
                x += panel.width + GAP;
                (height, right) = (height.max(panel.height), right.max(x - GAP + MARGIN));
            }
            y += height;
        }
        if let Some(legend) = &self.legend {
            y += 12.0;
            body.push_str(&legend.group((MARGIN, y)));
            y += legend.height;
            right = right.max(legend.width + 2.0 * MARGIN);
        }
        // About 8 pixels a bold letter.
        right = right.max(2.0 * MARGIN + 8.0 * self.title.chars().count() as f64);
        let (width, height) = (right.ceil(), (y + MARGIN).ceil());
        let (paper, ink) = (Tone::Paper.hex(), Tone::Ink.hex());
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"system-ui, sans-serif\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"{paper}\"/>\n\
             <text x=\"{MARGIN}\" y=\"26\" font-size=\"15\" font-weight=\"bold\" fill=\"{ink}\">{}</text>\n{body}</svg>\n",
            escape(&self.title)
        )
    }

    /// A section of a page.
    pub fn html(&self) -> String {
        let id = escape(&self.id);
        let mut html = format!(
            "<section id=\"{id}\">\n<h2>{}</h2>\n<p>{}</p>\n",
            escape(&self.title),
            escape(&self.caption)
        );
        for row in &self.rows {
            html.push_str("<div class=\"panels\">\n");
            row.iter().for_each(|panel| html.push_str(&panel.inline()));
            html.push_str("</div>\n");
        }
        if let Some(legend) = &self.legend {
            let _ = writeln!(html, "<div class=\"legend\">\n{}</div>", legend.inline());
        }
        html.push_str("</section>\n");
        html
    }
}

/// Legend of the sequential scale: its ends, its middle and what it measures.
fn scale_legend(meaning: &str) -> Panel {
    const STEPS: usize = 20;
    const WIDTH: f64 = 200.0;
    let mut legend = Panel::new(328.0, 44.0, format!("Colour scale: {meaning}, 0 to 100 percent"));
    legend.text((0.0, 10.0), panel::Anchor::Start, Tone::Ink, meaning);
    let step = WIDTH / STEPS as f64;
    for i in 0..STEPS {
        let share = (i as f64 + 0.5) / STEPS as f64;
        legend.cell((i as f64 * step, 16.0), (step + 0.5, 12.0), share, "");
    }
    for (share, anchor) in
        [(0.0, panel::Anchor::Start), (0.5, panel::Anchor::Middle), (1.0, panel::Anchor::End)]
    {
        let text = format!("{:.0} %", 100.0 * share);
        legend.text((WIDTH * share, 41.0), anchor, Tone::Soft, text);
    }
    legend
}
