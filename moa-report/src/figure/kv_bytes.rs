use super::palette::Tone;
use super::panel::Anchor;
use super::{Figure, Panel};
use crate::text::{bytes, percent};

const WIDTH: f64 = 326.0;
const LEFT: f64 = 92.0;
/// Room for the longest value behind the longest bar.
const RIGHT: f64 = 116.0;
const BAR: f64 = 14.0;
/// Longest name, in letters, that fits before the bars.
const NAME: usize = 11;

/// Bytes of the caches of one sequence, dense and by plan, at one context length.
#[derive(Clone, Debug)]
pub struct Bars {
    /// Context length, in tokens.
    pub length: usize,
    /// Bytes of a dense cache.
    pub dense: u64,
    /// Name and bytes of each plan.
    pub plans: Vec<(String, u64)>,
}

/// Bars of KV cache bytes: a group per context length, dense first. `types` says of what type the plans' keys and values
/// are, `dense` of what type those of the dense cache.
pub fn kv_bytes(groups: &[Bars], types: &str, dense: &str) -> Figure {
    let rows: usize = groups.iter().map(|g| g.plans.len() + 1).sum();
    let height = 22.0 * groups.len() as f64 + (BAR + 4.0) * rows as f64 + 8.0;
    let mut panel = Panel::new(WIDTH, height, "KV cache bytes by context length".to_string());
    let largest = groups.iter().map(|g| g.dense).max().unwrap_or(1).max(1) as f64;
    let mut y = 0.0;
    for group in groups {
        panel.text((0.0, y + 14.0), Anchor::Start, Tone::Ink, format_args!("N = {}", group.length));
        y += 20.0;
        let dense = ("dense", group.dense, Tone::Soft);
        let plans = group.plans.iter().map(|(name, n)| (name.as_str(), *n, Tone::First));
        for (name, n, tone) in std::iter::once(dense).chain(plans) {
            let length = (WIDTH - LEFT - RIGHT) * n as f64 / largest;
            let share = n as f64 / group.dense.max(1) as f64;
            let tip = format!("{name} at N = {}: {n} bytes", group.length);
            panel.text((LEFT - 6.0, y + 11.0), Anchor::End, Tone::Soft, shorten(name));
            panel.rect((LEFT, y), (length.max(1.0), BAR), tone, &tip);
            let value = match name {
                "dense" => bytes(n),
                _ => format!("{} ({})", bytes(n), percent(share)),
            };
            panel.text((LEFT + length + 5.0, y + 11.0), Anchor::Start, Tone::Ink, value);
            y += BAR + 4.0;
        }
        y += 2.0;
    }
    Figure {
        id: "kv-bytes".to_string(),
        title: "KV cache of one sequence".to_string(),
        caption: format!(
            "Bytes of keys and values that a sequence opened for N tokens holds, in {types}, and of a dense \
             cache in {dense}; in brackets, the share of the dense cache."
        ),
        rows: vec![vec![panel]],
        legend: None,
    }
}

/// The beginning and the end of a long name.
fn shorten(name: &str) -> String {
    let letters: Vec<char> = name.chars().collect();
    match letters.len() {
        n if n > NAME => {
            let (head, tail) = (&letters[..NAME - 5], &letters[n - 4..]);
            head.iter().chain(&['…']).chain(tail).collect()
        }
        _ => name.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_in_proportion_and_named() {
        let plans = vec![("a-long-plan-of-many-words".to_string(), 1 << 19)];
        let svg = kv_bytes(&[Bars { length: 4096, dense: 1 << 20, plans }], "int8", "bf16").svg();
        assert!(svg.contains("512.00 KiB (50.0 %)") && svg.contains("a-long…ords"), "{svg}");
        assert!(svg.contains("width=\"118.0\"") && svg.contains("width=\"59.0\""), "{svg}");
    }
}
