use super::axis::Axis;
use super::palette::Tone;
use super::panel::{Anchor, Mark, Panel};

const WIDTH: f64 = 326.0;
const HEIGHT: f64 = 288.0;
const LEFT: f64 = 50.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 42.0;

/// A point of a scatter plot.
#[derive(Clone, Debug)]
pub(crate) struct Point {
    pub(crate) x: f64,
    pub(crate) y: f64,
    /// What it is, shown when it is pointed at.
    pub(crate) tip: String,
    /// A few letters beside the mark, or none.
    pub(crate) name: String,
    pub(crate) mark: Mark,
    pub(crate) tone: Tone,
}

/// Words of a scatter plot: its heading and what its axes measure, with units.
#[derive(Clone, Debug)]
pub(crate) struct Labels {
    pub(crate) heading: String,
    pub(crate) x: String,
    pub(crate) y: String,
}

/// Draws points; the y axis is logarithmic where `log_y` and the values differ much. Points with
/// a coordinate that is not a finite number are left out.
pub(crate) fn scatter(labels: &Labels, points: &[Point], log_y: bool) -> Panel {
    let points: Vec<&Point> =
        points.iter().filter(|p| p.x.is_finite() && p.y.is_finite()).collect();
    let axis = |of: &dyn Fn(&Point) -> f64, log| {
        Axis::around(&points.iter().map(|p| of(p)).collect::<Vec<_>>(), log)
    };
    let (x, y) = (axis(&|p| p.x, false), axis(&|p| p.y, log_y));
    let about =
        format!("{}: {} against {}, {} points", labels.heading, labels.y, labels.x, points.len());
    let mut panel = Panel::new(WIDTH, HEIGHT, about);
    let (right, bottom) = (WIDTH - 14.0, HEIGHT - BOTTOM);
    let at_x = |value: f64| LEFT + (right - LEFT) * x.share(value);
    let at_y = |value: f64| bottom - (bottom - TOP) * y.share(value);
    panel.heading(&labels.heading);
    // Above the axis rather than turned along it: it can be read without tilting a phone.
    panel.text((0.0, TOP - 8.0), Anchor::Start, Tone::Soft, &labels.y);
    for (value, label) in &y.ticks {
        panel.line((LEFT, at_y(*value)), (right, at_y(*value)), Tone::Line);
        panel.text((LEFT - 6.0, at_y(*value) + 4.0), Anchor::End, Tone::Soft, label);
    }
    for (value, label) in &x.ticks {
        panel.line((at_x(*value), TOP), (at_x(*value), bottom), Tone::Line);
        panel.text((at_x(*value), bottom + 15.0), Anchor::Middle, Tone::Soft, label);
    }
    panel.text((right, HEIGHT - 8.0), Anchor::End, Tone::Soft, &labels.x);
    for point in points {
        let place = (at_x(point.x), at_y(point.y));
        panel.mark(place, point.mark, point.tone, &point.tip);
        if !point.name.is_empty() {
            // To the left of points near the right edge, where there is no room on the right.
            let is_right = x.share(point.x) > 0.85;
            let (shift, anchor) = if is_right { (-8.0, Anchor::End) } else { (8.0, Anchor::Start) };
            panel.text((place.0 + shift, place.1 - 6.0), anchor, Tone::Ink, &point.name);
        }
    }
    panel
}

/// Explains marks, one a line.
pub(crate) fn legend(entries: &[(Mark, Tone, &str)]) -> Panel {
    let height = 18.0 * entries.len() as f64 + 2.0;
    let words: Vec<_> = entries.iter().map(|(_, _, text)| *text).collect();
    let mut panel = Panel::new(328.0, height, format!("Legend: {}", words.join(", ")));
    for (row, (mark, tone, text)) in entries.iter().enumerate() {
        let y = 10.0 + 18.0 * row as f64;
        panel.mark((10.0, y), *mark, *tone, "");
        panel.text((24.0, y + 4.0), Anchor::Start, Tone::Ink, text);
    }
    panel
}
