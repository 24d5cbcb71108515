use moa_core::Plan;
use serde::{Serialize, Serializer};

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Widest line of maps that are drawn side by side.
const LINE: usize = 100;

/// Spans of all heads of a plan at one context length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeadMap {
    /// Context length, in tokens.
    pub length: usize,
    /// KV heads of each layer.
    pub kv_heads: usize,
    /// Keys that each head keeps, layer-major.
    pub spans: Vec<usize>,
}

impl HeadMap {
    /// The spans of `plan` in a sequence opened for `length` tokens.
    pub fn new(plan: &Plan, length: usize) -> Self {
        let spans = plan.spans(length).iter().map(|s| s.total().min(length)).collect();
        Self { length, kv_heads: plan.shape().kv_heads, spans }
    }

    /// Spans by layer.
    pub fn layers(&self) -> impl Iterator<Item = &[usize]> {
        self.spans.chunks(self.kv_heads)
    }

    /// Share of the context that a span keeps.
    pub fn share(&self, span: usize) -> f64 {
        span as f64 / self.length.max(1) as f64
    }

    /// Draws maps for a terminal: a line per layer, a bar per KV head as high as span / N, the maps side
    /// by side where they fit.
    pub fn draw(maps: &[Self]) -> String {
        let Some(first) = maps.first() else { return String::new() };
        let per_line = ((LINE - 8) / (first.width() + 4)).max(1);
        let mut blocks = Vec::new();
        for group in maps.chunks(per_line) {
            let columns: Vec<Vec<String>> = group
                .iter()
                .map(|map| {
                    let head = format!("N = {}", map.length);
                    std::iter::once(head).chain(map.layers().map(|l| map.row(l))).collect()
                })
                .collect();
            let width = group.iter().map(HeadMap::width).max().unwrap_or(0);
            let lines = (0..columns[0].len()).map(|row| {
                let label = if row == 0 { String::new() } else { format!("layer {}", row - 1) };
                let cells: Vec<_> = columns.iter().map(|c| pad(&c[row], width)).collect();
                format!("{label:<9} {}", cells.join("    ")).trim_end().to_string()
            });
            blocks.push(lines.collect::<Vec<_>>().join("\n"));
        }
        blocks.push(
            "bars: one per KV head; ▁ at most 1/8 of the context, █ more than 7/8".to_string(),
        );
        blocks.join("\n\n")
    }

    fn bar(&self, span: usize) -> char {
        let level = (self.share(span) * 8.0).ceil() as usize;
        BARS[level.clamp(1, 8) - 1]
    }

    /// One bar per head, wide where there are few of them.
    fn row(&self, spans: &[usize]) -> String {
        let cell = |span: &usize| match self.kv_heads {
            0..=16 => format!("{0}{0} ", self.bar(*span)),
            _ => self.bar(*span).to_string(),
        };
        spans.iter().map(cell).collect::<String>().trim_end().to_string()
    }

    fn width(&self) -> usize {
        let head = format!("N = {}", self.length).len();
        head.max(if self.kv_heads <= 16 { 3 * self.kv_heads - 1 } else { self.kv_heads })
    }
}

/// Spans by layer, `[layer][KV head]`.
impl Serialize for HeadMap {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.layers())
    }
}

/// Pads by characters; bars take three bytes each.
fn pad(text: &str, width: usize) -> String {
    text.to_string() + &" ".repeat(width.saturating_sub(text.chars().count()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_high_as_spans() {
        let map = HeadMap { length: 800, kv_heads: 2, spans: vec![800, 80, 101, 700] };
        let text = HeadMap::draw(&[map.clone(), map]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "          N = 800    N = 800");
        assert_eq!(lines[1], "layer 0   ██ ▁▁      ██ ▁▁");
        assert_eq!(lines[2], "layer 1   ▂▂ ▇▇      ▂▂ ▇▇");
    }

    #[test]
    fn many_heads_and_lengths_wrap() {
        let map = HeadMap { length: 100, kv_heads: 64, spans: vec![50; 128] };
        let text = HeadMap::draw(&[map.clone(), map]);
        assert!(text.lines().all(|line| line.chars().count() <= LINE), "{text}");
        assert_eq!(text.matches("N = 100").count(), 2);
    }
}
