use std::fmt::Write;

use crate::head_map::HeadMap;

/// Colours of shares 0 and 1, and between them linear in RGB.
const LIGHT: [f64; 3] = [233.0, 240.0, 250.0];
const DARK: [f64; 3] = [8.0, 48.0, 107.0];

const GAP: usize = 28;
const LEFT: usize = 62;
const TOP: usize = 62;
const BOTTOM: usize = 52;

/// Draws maps as an SVG picture: a panel per length, layers from top to bottom, KV heads from left
/// to right, coloured by span / N.
pub(crate) fn draw(title: &str, maps: &[HeadMap]) -> String {
    let heads = maps.first().map_or(1, |m| m.kv_heads);
    let layers = maps.first().map_or(1, |m| m.spans.len() / m.kv_heads.max(1));
    // Small models get large cells, large models a picture of about a screen's height.
    let cell = (640 / layers.max(1)).clamp(8, 26);
    let cell_width = if heads <= 8 { 2 * cell } else { cell };
    let panel = (heads * cell_width).max(76);
    let width = (LEFT + maps.len() * (panel + GAP)).max(400);
    let height = TOP + layers * cell + BOTTOM;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"12\" y=\"22\" font-size=\"14\" font-weight=\"bold\">{}</text>\n",
        escape(title)
    );
    for (index, map) in maps.iter().enumerate() {
        let x = LEFT + index * (panel + GAP);
        text(&mut svg, (x, TOP - 10), "start", &format!("N = {}", map.length));
        for (layer, spans) in map.layers().enumerate() {
            let y = TOP + layer * cell;
            if index == 0 && layer % (14usize.div_ceil(cell)).max(1) == 0 {
                text(&mut svg, (LEFT - 8, y + cell / 2 + 4), "end", &format!("layer {layer}"));
            }
            for (head, &span) in spans.iter().enumerate() {
                let share = map.share(span);
                let _ = writeln!(
                    svg,
                    "<rect x=\"{}\" y=\"{y}\" width=\"{}\" height=\"{}\" fill=\"{}\"><title>layer {layer}, \
                     KV head {head}: {span} of {} keys ({:.1} %)</title></rect>",
                    x + head * cell_width,
                    cell_width - 1,
                    cell - 1,
                    colour(share),
                    map.length,
                    100.0 * share,
                );
            }
        }
    }
    legend(&mut svg, height - 30);
    svg.push_str("</svg>\n");
    svg
}

fn legend(svg: &mut String, y: usize) {
    const STEPS: usize = 10;
    text(svg, (LEFT - 8, y + 10), "end", "span / N");
    for step in 0..STEPS {
        let share = (step as f64 + 0.5) / STEPS as f64;
        let _ = writeln!(
            svg,
            "<rect x=\"{}\" y=\"{y}\" width=\"20\" height=\"12\" fill=\"{}\"/>",
            LEFT + 20 * step,
            colour(share)
        );
    }
    text(svg, (LEFT, y + 25), "middle", "0");
    text(svg, (LEFT + 20 * STEPS, y + 25), "middle", "1");
    text(svg, (LEFT + 20 * STEPS + 16, y + 10), "start", "columns: KV heads");
}

fn text(svg: &mut String, (x, y): (usize, usize), anchor: &str, content: &str) {
    let _ = writeln!(
        svg,
        "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\">{}</text>",
        escape(content)
    );
}

fn colour(share: f64) -> String {
    let share = share.clamp(0.0, 1.0);
    let [r, g, b] = [0, 1, 2].map(|i| (LIGHT[i] + (DARK[i] - LIGHT[i]) * share).round() as u8);
    format!("#{r:02x}{g:02x}{b:02x}")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_head_has_its_cell_at_every_length() {
        let map = |length| HeadMap { length, kv_heads: 2, spans: vec![length, 10, 20, 30] };
        let svg = draw("a < b & c", &[map(100), map(200)]);
        assert_eq!(svg.matches("<title>").count(), 8);
        assert!(svg.contains("layer 1, KV head 0: 20 of 200 keys (10.0 %)"));
        assert!(svg.contains("a &lt; b &amp; c"));
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    }

    #[test]
    fn colours_run_from_light_to_dark() {
        assert_eq!(colour(0.0), "#e9f0fa");
        assert_eq!(colour(1.0), "#08306b");
        assert_eq!(colour(7.0), colour(1.0));
    }
}
