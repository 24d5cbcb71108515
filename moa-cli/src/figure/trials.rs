use moa_core::Trial;

use super::Figure;
use super::palette::Tone;
use super::panel::Mark;
use super::plot::{Labels, Point, legend, scatter};
use crate::plans::PlanFile;

/// Measured against predicted loss of the plans that were tried on the way to each plan: a panel per
/// plan and measured length. `None` if no plan says its trials.
pub(crate) fn trials(plans: &[PlanFile]) -> Option<Figure> {
    let mut panels = Vec::new();
    for file in plans {
        let all = &file.plan.provenance.trials;
        let mut lengths: Vec<usize> = all.iter().map(|t| t.measured_at).collect();
        lengths.sort_unstable();
        lengths.dedup();
        for length in lengths {
            let own: Vec<&Trial> = all.iter().filter(|t| t.measured_at == length).collect();
            let predicted_at = own[0].predicted_at;
            let labels = Labels {
                heading: format!("{}, {} plans", file.label, own.len()),
                x: format!("predicted loss at {predicted_at} tokens"),
                y: format!("measured response loss at {length} tokens, nats per token"),
            };
            let points: Vec<Point> = own.iter().map(|t| point(t)).collect();
            panels.push(scatter(&labels, &points, true));
        }
    }
    (!panels.is_empty()).then(|| Figure {
        id: "predicted-measured".to_string(),
        title: "Predicted against measured loss".to_string(),
        caption: "Each mark is a plan that was measured. Influence predicts the loss of masking to first \
                  order, in units of the objective; refinement predicts from measured changes of single \
                  heads. Where marks do not rise from left to right, the prediction ranks plans wrongly \
                  and only measurement can decide."
            .to_string(),
        panels,
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
