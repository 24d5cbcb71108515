use moa_core::{CacheType, Plan};
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
    /// The types in which heads hold them, as far as the plan says; may be empty.
    pub types: Vec<Option<CacheType>>,
}

impl HeadMap {
    /// The spans of `plan` in a sequence opened for `length` tokens.
    pub fn new(plan: &Plan, length: usize) -> Self {
        let spans = plan.spans(length).iter().map(|s| s.total().min(length)).collect();
        let types = plan.cache_types().to_vec();
        Self { length, kv_heads: plan.shape().kv_heads, spans, types }
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
                    let rows = (0..map.layers().count()).map(|layer| map.row(layer));
                    std::iter::once(head).chain(rows).collect()
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
        if maps.iter().any(|map| !map.types.is_empty()) {
            blocks.push(
                "beside them the cache's bits: 8 int8, f fp8, k keys in 8 and values in 4, 4 int4, \
                 - the engine's own"
                    .to_string(),
            );
        }
        blocks.join("\n\n")
    }

    fn bar(&self, span: usize) -> char {
        let level = (self.share(span) * 8.0).ceil() as usize;
        BARS[level.clamp(1, 8) - 1]
    }

    /// What stands for a head's type.
    fn bits(&self, head: usize) -> char {
        match self.types.get(head).copied().flatten() {
            None if self.types.is_empty() => ' ',
            None => '-',
            Some(CacheType::Int8) => '8',
            Some(CacheType::Fp8) => 'f',
            Some(CacheType::K8V4) => 'k',
            Some(CacheType::Int4) => '4',
            Some(_) => 'w',
        }
    }

    /// One bar per head, wide where there are few of them, and its type where the plan says one.
    fn row(&self, layer: usize) -> String {
        let heads = layer * self.kv_heads..((layer + 1) * self.kv_heads).min(self.spans.len());
        let cell = |head: usize| match (self.bar(self.spans[head]), self.kv_heads) {
            (bar, 0..=16) => format!("{bar}{bar}{}", self.bits(head)),
            (bar, _) if self.types.is_empty() => bar.to_string(),
            (bar, _) => format!("{bar}{}", self.bits(head)),
        };
        heads.map(cell).collect::<String>().trim_end().to_string()
    }

    fn width(&self) -> usize {
        let head = format!("N = {}", self.length).len();
        let typed = usize::from(!self.types.is_empty());
        head.max(match self.kv_heads {
            0..=16 => (3 * self.kv_heads + typed).saturating_sub(1),
            heads => heads * (1 + typed),
        })
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
        let map =
            HeadMap { length: 800, kv_heads: 2, spans: vec![800, 80, 101, 700], types: vec![] };
        let text = HeadMap::draw(&[map.clone(), map]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[0], "          N = 800    N = 800");
        assert_eq!(lines[1], "layer 0   ██ ▁▁      ██ ▁▁");
        assert_eq!(lines[2], "layer 1   ▂▂ ▇▇      ▂▂ ▇▇");
        let types = vec![Some(CacheType::Int8), Some(CacheType::Int4), None, Some(CacheType::K8V4)];
        let map = HeadMap { length: 800, kv_heads: 2, spans: vec![800, 80, 101, 700], types };
        let text = HeadMap::draw(&[map]);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[1..3], ["layer 0   ██8▁▁4", "layer 1   ▂▂-▇▇k"]);
        assert!(text.contains("8 int8"));
    }

    #[test]
    fn many_heads_and_lengths_wrap() {
        let map = HeadMap { length: 100, kv_heads: 64, spans: vec![50; 128], types: vec![] };
        let text = HeadMap::draw(&[map.clone(), map]);
        assert!(text.lines().all(|line| line.chars().count() <= LINE), "{text}");
        assert_eq!(text.matches("N = 100").count(), 2);
    }
}
