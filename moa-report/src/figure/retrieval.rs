use super::palette::Tone;
use super::panel::Anchor;
use super::{Figure, Panel, scale_legend};
use crate::answers::{Answer, Answers};
use crate::text::percent;

const LEFT: f64 = 66.0;
const TOP: f64 = 38.0;
const HEIGHT: f64 = 26.0;
/// Prompts within this factor of the shortest count as one length.
const SAME: f64 = 1.25;
/// Questions per cell that ten rows of depths leave, where there are that many.
const ENOUGH: usize = 5;

/// Retrieval by prompt length and depth of the answer: a panel per file, all on the same grid.
pub fn retrieval(files: &[Answers]) -> Figure {
    let lengths = Lengths::of(files);
    let fewest = files.iter().map(|f| f.answers.len()).min().unwrap_or(0);
    let knows_depth = files.iter().flat_map(|f| &f.answers).any(|a| a.depth.is_some());
    let rows = match fewest / lengths.starts.len().max(1) {
        _ if !knows_depth => 1,
        per_length if per_length >= 10 * ENOUGH => 10,
        _ => 5,
    };
    Figure {
        id: "retrieval".to_string(),
        title: "Retrieval by prompt length and depth".to_string(),
        caption: "Share of questions answered right, in percent. Columns: tokens of the prompt; rows: where \
                  the answer lies, from the beginning of the prompt (0 %) to its end (100 %). A dash marks \
                  cells without questions; point at a cell for its count."
            .to_string(),
        rows: vec![files.iter().map(|file| panel(file, &lengths, rows)).collect()],
        legend: Some(scale_legend("share of questions answered right")),
    }
}

/// Groups of similar prompt lengths.
struct Lengths {
    /// Shortest of each group, ascending.
    starts: Vec<usize>,
    /// Mean of each group.
    means: Vec<f64>,
}

impl Lengths {
    fn of(files: &[Answers]) -> Self {
        let mut all: Vec<usize> =
            files.iter().flat_map(|f| &f.answers).map(|a| a.prompt_tokens).collect();
        all.sort_unstable();
        let groups: Vec<&[usize]> = {
            let mut rest = &all[..];
            let mut groups = Vec::new();
            while let Some(&first) = rest.first() {
                let end = rest.partition_point(|n| *n as f64 <= first as f64 * SAME);
                let (group, others) = rest.split_at(end.max(1));
                groups.push(group);
                rest = others;
            }
            groups
        };
        let mean = |group: &[usize]| group.iter().sum::<usize>() as f64 / group.len() as f64;
        Self {
            starts: groups.iter().map(|g| g[0]).collect(),
            means: groups.iter().map(|g| mean(g)).collect(),
        }
    }

    fn column(&self, answer: &Answer) -> usize {
        self.starts.partition_point(|start| *start <= answer.prompt_tokens).saturating_sub(1)
    }
}

fn panel(file: &Answers, lengths: &Lengths, rows: usize) -> Panel {
    let columns = lengths.starts.len();
    let mut counts = vec![(0usize, 0usize); rows * columns];
    for answer in &file.answers {
        let depth = if rows == 1 { Some(0.0) } else { answer.depth };
        let Some(depth) = depth else { continue };
        let row = ((depth * rows as f64) as usize).min(rows - 1);
        let (right, all) = &mut counts[row * columns + lengths.column(answer)];
        *right += usize::from(answer.right);
        *all += 1;
    }
    let width = (260.0 / columns.max(1) as f64).floor().clamp(24.0, 48.0);
    let bottom = TOP + rows as f64 * HEIGHT;
    let heading =
        format!("{}: {} of {} right", file.name, percent(file.accuracy()), file.answers.len());
    let right =
        (LEFT + columns as f64 * width).max(8.0 * heading.chars().count() as f64).max(200.0);
    let mut panel = Panel::new(right, bottom + 34.0, format!("Retrieval, {heading}"));
    panel.heading(&heading);
    panel.text((0.0, TOP - 8.0), Anchor::Start, Tone::Soft, "depth of the answer");
    for row in 0..rows {
        let y = TOP + row as f64 * HEIGHT;
        let (from, to) = (100 * row / rows, 100 * (row + 1) / rows);
        let depths = if rows == 1 { "all".to_string() } else { format!("{from}–{to} %") };
        panel.text((LEFT - 6.0, y + HEIGHT / 2.0 + 4.0), Anchor::End, Tone::Soft, &depths);
        for column in 0..columns {
            let (place, size) = ((LEFT + column as f64 * width, y), (width - 1.0, HEIGHT - 1.0));
            let middle = (place.0 + size.0 / 2.0, place.1 + size.1 / 2.0);
            let tokens = lengths.means[column];
            match counts[row * columns + column] {
                (_, 0) => {
                    panel.frame(
                        place,
                        size,
                        &format!("no question of about {tokens:.0} tokens here"),
                    );
                    panel.cell_text(middle, 0.0, "–");
                }
                (right, all) => {
                    let share = right as f64 / all as f64;
                    let tip =
                        format!("{right} of {all} right, about {tokens:.0} tokens, depth {depths}");
                    panel.cell(place, size, share, &tip);
                    panel.cell_text(middle, share, format_args!("{:.0}", 100.0 * share));
                }
            }
        }
    }
    for (column, mean) in lengths.means.iter().enumerate() {
        let x = LEFT + (column as f64 + 0.5) * width - 0.5;
        panel.text((x, bottom + 14.0), Anchor::Middle, Tone::Soft, tokens(*mean));
    }
    panel.text((LEFT, bottom + 30.0), Anchor::Start, Tone::Soft, "prompt tokens (mean)");
    panel
}

/// A count of tokens in a few letters.
fn tokens(n: f64) -> String {
    match n {
        n if n < 999.5 => format!("{n:.0}"),
        n if n < 9950.0 => format!("{:.1}k", n / 1000.0),
        n => format!("{:.0}k", n / 1000.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(name: &str, answers: &[(usize, f64, bool)]) -> Answers {
        let answers = answers.iter().map(|&(prompt_tokens, depth, right)| Answer {
            prompt_tokens,
            depth: Some(depth),
            right,
        });
        Answers { name: name.to_string(), evaluation: None, answers: answers.collect() }
    }

    #[test]
    fn questions_fall_into_their_cells() {
        let file = items(
            "plan",
            &[(1000, 0.0, true), (1100, 0.1, false), (2000, 1.0, true), (2100, 0.99, true)],
        );
        let other = items("dense", &[(1000, 0.5, true)]);
        let figure = retrieval(&[file, other]);
        let svg = figure.rows[0][0].inline();
        assert!(svg.contains("1 of 2 right, about 1033 tokens, depth 0–20 %"), "{svg}");
        assert!(svg.contains("2 of 2 right, about 2050 tokens, depth 80–100 %"), "{svg}");
        assert!(svg.contains("plan: 75.0 % of 4 right"), "{svg}");
        assert_eq!(svg.matches(">–<").count(), 8, "10 cells, 2 with questions");
        assert_eq!(figure.rows[0][1].inline().matches(">–<").count(), 9);
    }

    #[test]
    fn items_without_depths_make_one_row() {
        let answer = Answer { prompt_tokens: 12_345, depth: None, right: true };
        let figure = retrieval(&[Answers {
            name: "a".to_string(),
            evaluation: None,
            answers: vec![answer],
        }]);
        assert!(figure.rows[0][0].inline().contains("12k"));
    }
}
