use super::Figure;
use super::palette::Tone;
use super::panel::Mark;
use super::plot::{Labels, Point, legend, scatter};
use crate::NamedPlan;

/// Most plans whose marks are named; more would cover each other.
const NAMED: usize = 16;

/// Predicted losses of searched plans: a panel for each pair of a shorter length with the longest,
/// or, of plans for one length, loss against density. `None` if the plans say no predictions for the
/// same lengths. Plans that are among `chosen` too get a ring; a plan of the name `plan-07.json` is labelled 07.
pub fn pareto(files: &[NamedPlan], chosen: &[NamedPlan]) -> Option<Figure> {
    let first = &files.first()?.plan.provenance.predicted_losses;
    let lengths: Vec<usize> = first.iter().map(|l| l.length).collect();
    let losses: Vec<Vec<f64>> = files
        .iter()
        .map(|file| {
            let own = &file.plan.provenance.predicted_losses;
            lengths
                .iter()
                .map(|n| own.iter().find(|l| l.length == *n).map(|l| l.value))
                .collect::<Option<Vec<f64>>>()
        })
        .collect::<Option<_>>()?;
    let (&longest, shorter) = lengths.split_last()?;
    let points = |x: &dyn Fn(usize) -> f64, x_name: &str| -> Vec<Point> {
        let mut points = Vec::new();
        for (index, file) in files.iter().enumerate() {
            let (x, y) = (x(index), losses[index][lengths.len() - 1]);
            let name = &file.name;
            let short = name.trim_start_matches("plan-").trim_end_matches(".json").to_string();
            let tip = format!("{name}: {x_name} {x:.4}, predicted loss at {longest} {y:.4}");
            let is_chosen = chosen.iter().any(|c| c.plan.rules() == file.plan.rules());
            if is_chosen {
                let mark = (Mark::Ring, Tone::Second);
                points.push(Point {
                    x,
                    y,
                    tip: String::new(),
                    name: String::new(),
                    mark: mark.0,
                    tone: mark.1,
                });
            }
            let name = if files.len() <= NAMED { short } else { String::new() };
            points.push(Point { x, y, tip, name, mark: Mark::Circle, tone: Tone::First });
        }
        points
    };
    let y = format!("predicted loss at {longest} tokens");
    let panels = if shorter.is_empty() {
        let x = format!("density at {longest} tokens (share of the KV cache)");
        let labels = Labels { heading: "Loss and size".to_string(), x, y };
        vec![scatter(&labels, &points(&|i| files[i].plan.density(longest), "density"), false)]
    } else {
        let panel = |(index, length): (usize, &usize)| {
            let labels = Labels {
                heading: format!("{length} against {longest} tokens"),
                x: format!("predicted loss at {length} tokens"),
                y: y.clone(),
            };
            let name = format!("predicted loss at {length}");
            scatter(&labels, &points(&|i| losses[i][index], &name), false)
        };
        shorter.iter().enumerate().map(panel).collect()
    };
    let objective = files[0].plan.provenance.objective.as_deref().unwrap_or("objective");
    let mut marks = vec![(Mark::Circle, Tone::First, "a plan of the search, by its number")];
    if files.iter().any(|f| chosen.iter().any(|c| c.plan.rules() == f.plan.rules())) {
        marks.push((Mark::Ring, Tone::Second, "the plan of this report"));
    }
    Some(Figure {
        id: "pareto".to_string(),
        title: "Pareto front of searched plans".to_string(),
        caption: format!(
            "Predicted loss beyond dense attention's, in units of the objective ({objective}), summed over \
             heads; lower is better. No plan is better than another at every length."
        ),
        rows: vec![panels],
        legend: Some(legend(&marks)),
    })
}
