use super::palette::Tone;
use super::panel::Anchor;
use super::{Figure, Panel, scale_legend};
use crate::head_map::HeadMap;

const LEFT: f64 = 52.0;
const TOP: f64 = 24.0;

/// A row per plan and in it a panel per length: layers from top to bottom, KV heads from left to
/// right, coloured by span / N. Names of plans may be empty.
pub fn head_map(title: &str, plans: &[(&str, Vec<HeadMap>)]) -> Figure {
    let caption = "One cell per KV head. Dark (bright, on a dark page) heads keep the whole context; the \
                   palest keep the first tokens and a short window. Point at a cell for its span.";
    Figure {
        id: "heads".to_string(),
        title: title.to_string(),
        caption: caption.to_string(),
        rows: plans
            .iter()
            .map(|(name, maps)| maps.iter().map(|m| panel(name, m)).collect())
            .collect(),
        legend: Some(scale_legend("span / N: share of the context that a head keeps")),
    }
}

fn panel(name: &str, map: &HeadMap) -> Panel {
    let heads = map.kv_heads.max(1);
    let layers = map.spans.len() / heads;
    // Small models get large cells, large models a picture of about a screen's height.
    let height = (560.0 / layers.max(1) as f64).floor().clamp(7.0, 24.0);
    let width = (224.0 / heads as f64).floor().clamp(7.0, 44.0);
    let right = (LEFT + heads as f64 * width).max(150.0);
    let bottom = TOP + layers as f64 * height;
    let separator = if name.is_empty() { "" } else { ", " };
    let heading = format!("{name}{separator}N = {}", map.length);
    // About 8 pixels a bold letter.
    let right = right.max(8.0 * heading.chars().count() as f64);
    let label = format!("{heading}: spans of {layers} layers of {heads} KV heads");
    let mut panel = Panel::new(right + 1.0, bottom + 34.0, label);
    panel.heading(heading);
    let every = |size: f64, room: f64| (room / size).ceil().max(1.0) as usize;
    for (layer, spans) in map.layers().enumerate() {
        let y = TOP + layer as f64 * height;
        if layer.is_multiple_of(every(height, 15.0)) {
            let text = if layer == 0 { "layer 0".to_string() } else { layer.to_string() };
            panel.text((LEFT - 6.0, y + height / 2.0 + 4.0), Anchor::End, Tone::Soft, text);
        }
        for (head, &span) in spans.iter().enumerate() {
            let share = map.share(span);
            let own = map.types.get(layer * heads + head).copied().flatten();
            let own = own.map_or(String::new(), |own| format!(", in {own}"));
            let tip = format!(
                "layer {layer}, KV head {head}: {span} of {} keys ({:.1} %){own}",
                map.length,
                100.0 * share
            );
            let x = LEFT + head as f64 * width;
            panel.cell((x, y), (width - 1.0, height - 1.0), share, &tip);
        }
    }
    for head in (0..heads).step_by(every(width, 20.0)) {
        let x = LEFT + (head as f64 + 0.5) * width;
        panel.text((x, bottom + 13.0), Anchor::Middle, Tone::Soft, head);
    }
    panel.text((LEFT, bottom + 29.0), Anchor::Start, Tone::Soft, "KV head");
    panel
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_head_has_its_cell_at_every_length() {
        let map = |length| HeadMap {
            length,
            kv_heads: 2,
            spans: vec![length, 10, 20, 30],
            types: vec![],
        };
        let svg = head_map("a < b & c", &[("", vec![map(100), map(200)])]).svg();
        assert_eq!(svg.matches("<title>").count(), 8);
        assert!(svg.contains("layer 1, KV head 0: 20 of 200 keys (10.0 %)"));
        assert!(svg.contains("a &lt; b &amp; c"));
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    }

    #[test]
    fn large_models_fit_a_phone() {
        for (layers, heads) in [(80, 8), (40, 40), (32, 32), (6, 2), (1, 1)] {
            let map = HeadMap {
                length: 8,
                kv_heads: heads,
                spans: vec![8; layers * heads],
                types: vec![],
            };
            let panel = panel("plan", &map);
            assert!(panel.width <= 340.0 && panel.height <= 640.0, "{layers} x {heads}");
        }
    }
}
