use moa_models::{
    Calibration, CalibrationData, CalibrationOptions, CalibrationPrompt, Checkpoint, Math,
};

use crate::error::{Error, Result};
use crate::output::Context;
use crate::progress::Progress;

/// Reads what `--data` names.
pub(crate) fn load(data: &str) -> Result<CalibrationData> {
    Ok(match data {
        "tasks" => CalibrationData::Tasks,
        "records" => CalibrationData::Records,
        path => CalibrationData::Prompts(CalibrationPrompt::load(path)?),
    })
}

/// Flags with the lengths that they say.
pub(crate) type Lengths<'a> = &'a [(&'static str, &'a [usize])];

/// An error of a length under the flag that says it.
pub(crate) fn by_flag(error: moa_models::Error, lengths: Lengths<'_>) -> Error {
    use moa_models::Error::{ContextExceeded, Invalid};
    let wrong = match &error {
        ContextExceeded { asked, .. } => Some(*asked),
        Invalid { what: "length", got, .. } => got.parse().ok(),
        _ => None,
    };
    let says = |(_, own): &&(&str, &[usize])| wrong.is_some_and(|wrong| own.contains(&wrong));
    match lengths.iter().find(says) {
        Some((flag, _)) => Error::from(error).at(*flag),
        None => error.into(),
    }
}

/// Makes calibration items under a progress bar, of lengths that flags say.
pub(crate) fn items<D: Math>(
    model: &Checkpoint<D>,
    data: &CalibrationData,
    options: &CalibrationOptions,
    lengths: Lengths<'_>,
    context: &Context,
) -> Result<Calibration> {
    let mut bar = Progress::of_stages(context);
    model.calibrate(data, options, &mut bar).map_err(|error| by_flag(error, lengths))
}

/// Tells warnings on stderr.
pub(crate) fn tell(warnings: Vec<String>, context: &Context) -> Vec<String> {
    for warning in &warnings {
        context.note(format_args!("warning: {warning}"));
    }
    warnings
}
