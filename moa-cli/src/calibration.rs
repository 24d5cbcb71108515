use moa_models::{
    Calibration, CalibrationData, CalibrationOptions, CalibrationPrompt, Checkpoint, Math,
};

use crate::error::Result;
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

/// Makes calibration items under a progress bar.
pub(crate) fn items<D: Math>(
    model: &Checkpoint<D>,
    data: &CalibrationData,
    options: &CalibrationOptions,
    context: &Context,
) -> Result<Calibration> {
    let mut bar = Progress::of_stages(context);
    Ok(model.calibrate(data, options, &mut bar)?)
}

/// Tells warnings on stderr.
pub(crate) fn tell(warnings: Vec<String>, context: &Context) -> Vec<String> {
    for warning in &warnings {
        context.note(format_args!("warning: {warning}"));
    }
    warnings
}
