use moa_core::Trial;

use super::Figure;
use super::palette::Tone;
use super::panel::Mark;
use super::plot::{Labels, Point, legend, scatter};
use crate::NamedPlan;

/// Measured against predicted loss of the plans that were tried on the way to each plan: a panel per
/// plan, measured length and way to predict. `None` if no plan says its trials.
pub fn trials(plans: &[NamedPlan]) -> Option<Figure> {
    let mut rows = Vec::new();
    for file in plans {
        let mut panels = Vec::new();
        let all = &file.plan.provenance.trials;
        let mut lengths: Vec<usize> = all.iter().map(|t| t.measured_at).collect();
        lengths.sort_unstable();
        lengths.dedup();
        for length in lengths {
            // Influence and refinement predict in different units: never on one axis.
            for is_refined in [false, true] {
                let own: Vec<&Trial> = all
                    .iter()
                    .filter(|t| t.measured_at == length && (t.round > 0) == is_refined)
                    .collect();
                let Some(first) = own.first() else { continue };
                let (by, unit) = match is_refined {
                    false => ("influence", "objective"),
                    true => ("refinement", "nats"),
                };
                let labels = Labels {
                    heading: format!("{}: by {by}, {} plans", file.name, own.len()),
                    x: format!("predicted loss at {} tokens ({unit})", first.predicted_at),
                    y: format!("measured loss at {length} tokens (nats per token)"),
                };
                let points: Vec<Point> = own.iter().map(|t| point(t)).collect();
                panels.push(scatter(&labels, &points, true));
            }
        }
        rows.push(panels);
    }
    rows.retain(|panels| !panels.is_empty());
    (!rows.is_empty()).then(|| Figure {
        id: "predicted-measured".to_string(),
        title: "Predicted against measured loss".to_string(),
        caption: "Each mark is a plan that was measured, its response loss in nats per token. Influence \
                  predicts the loss of masking to first order, in units of the objective; refinement \
                  predicts from measured changes of single heads. Where marks do not rise from left to right, the prediction ranks plans wrongly \
                  and only measurement can decide."
            .to_string(),
        rows,
        legend: Some(legend(&[
            (Mark::Circle, Tone::First, "predicted by influence alone"),
            (Mark::Diamond, Tone::Second, "predicted in refinement"),
        ])),
    })
}

fn point(trial: &Trial) -> Point {
    let (mark, tone) = match trial.round {
        0 => (Mark::Circle, Tone::First),
        _ => (Mark::Diamond, Tone::Second),
    };
    let tip = format!(
        "round {}: predicted {:.4} at {}, measured {:.4} at {}",
        trial.round, trial.predicted, trial.predicted_at, trial.measured, trial.measured_at
    );
    Point { x: trial.predicted, y: trial.measured, tip, name: String::new(), mark, tone }
}
