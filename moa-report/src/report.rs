use moa_core::{CacheType, Plan};

use crate::figure::{self, Bars};
use crate::text::percent;
use crate::{
    Answers, Error, Figure, HeadMap, Page, PlanSize, PlanSummary, Result, Table, at_lengths,
    lengths_of,
};

/// A plan and what people call it.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedPlan {
    /// The name; where plans are compared, it stands on every picture.
    pub name: String,
    /// The plan.
    pub plan: Plan,
}

/// Everything that one page about plans shows; what is left empty is left out.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Heading of the page.
    pub title: String,
    /// Plans to draw, all for one model.
    pub plans: Vec<NamedPlan>,
    /// Plans of one search, for the Pareto front.
    pub searched: Vec<NamedPlan>,
    /// Answers under several caches, side by side.
    pub answers: Vec<Answers>,
    /// Context lengths to look at; empty for those of the plans' searches.
    pub lengths: Vec<usize>,
    /// Type of the caches of heads for which a plan says none.
    pub cache: CacheType,
}

/// A report without content, for caches of bf16.
impl Default for Report {
    fn default() -> Self {
        Self {
            title: "Attention spans".to_string(),
            plans: Vec::new(),
            searched: Vec::new(),
            answers: Vec::new(),
            lengths: Vec::new(),
            cache: CacheType::Bf16,
        }
    }
}

impl Report {
    /// The page. Its figures are, as far as there is something to draw, `heads`, `retrieval`, `kv-bytes`,
    /// `pareto` and `predicted-measured`.
    ///
    /// # Errors
    /// [`Error::OtherModel`] if the plans are for models of different dimensions: bytes of dense caches
    /// are drawn once; [`Error::OtherEvaluation`] if answers are to other questions than those before.
    pub fn page(&self) -> Result<Page> {
        self.check_models()?;
        self.check_answers()?;
        let lengths = self.lengths();
        let summary = |p: &NamedPlan| {
            let slot_bytes = self.cache.slot_bytes(p.plan.shape().head_dim);
            PlanSummary::new(&p.plan, &lengths, slot_bytes)
        };
        let summaries: Vec<PlanSummary> = self.plans.iter().map(summary).collect();
        let figures = [
            self.head_maps(&summaries),
            (!self.answers.is_empty()).then(|| figure::retrieval(&self.answers)),
            self.sizes(&summaries),
            figure::pareto(&self.searched, &self.plans),
            figure::trials(&self.plans),
        ];
        Ok(Page {
            title: self.title.clone(),
            facts: self.facts(),
            tables: self.tables(&summaries),
            figures: figures.into_iter().flatten().collect(),
        })
    }

    fn check_models(&self) -> Result<()> {
        let Some(first) = self.plans.first() else { return Ok(()) };
        for (index, NamedPlan { name, plan }) in self.plans.iter().enumerate() {
            let other = |source| Error::OtherModel { index, name: name.clone(), source };
            plan.check_shape(&first.plan.shape()).map_err(other)?;
        }
        Ok(())
    }

    /// Answers that do not say what they are to may be compared with any.
    fn check_answers(&self) -> Result<()> {
        let said = |of: &Answers| Some((of.name.clone(), of.evaluation.clone()?));
        let mut known = self.answers.iter().filter_map(said);
        let Some((_, expected)) = known.next() else { return Ok(()) };
        match known.find(|(_, own)| *own != expected) {
            None => Ok(()),
            Some((name, got)) => Err(Error::OtherEvaluation { name, expected, got }),
        }
    }

    fn lengths(&self) -> Vec<usize> {
        if !self.lengths.is_empty() {
            return self.lengths.clone();
        }
        let mut lengths: Vec<usize> = self.plans.iter().flat_map(|p| lengths_of(&p.plan)).collect();
        lengths.sort_unstable();
        lengths.dedup();
        lengths
    }

    fn head_maps(&self, summaries: &[PlanSummary]) -> Option<Figure> {
        let maps = |name, summary: &PlanSummary| -> (_, Vec<HeadMap>) { (name, summary.maps()) };
        match (&self.plans[..], summaries) {
            ([], _) => None,
            // A single plan needs no name on its panels.
            ([one], [summary]) => {
                let title = format!("Span of each KV head: {}", one.name);
                Some(figure::head_map(&title, &[maps("", summary)]))
            }
            _ => {
                let names = self.plans.iter().map(|p| p.name.as_str());
                let rows: Vec<_> = names.zip(summaries).map(|(n, s)| maps(n, s)).collect();
                Some(figure::head_map("Span of each KV head", &rows))
            }
        }
    }

    fn sizes(&self, summaries: &[PlanSummary]) -> Option<Figure> {
        let first = summaries.first()?;
        let bars = |(index, size): (usize, &PlanSize)| Bars {
            length: size.length,
            dense: size.kv_bytes_dense,
            plans: self
                .plans
                .iter()
                .zip(summaries)
                .map(|(p, summary)| (p.name.clone(), summary.sizes()[index].kv_bytes))
                .collect(),
        };
        let groups: Vec<Bars> = first.sizes().iter().enumerate().map(bars).collect();
        let is_used = |cache_type: &CacheType| {
            let own = |p: &NamedPlan| match p.plan.cache_types() {
                [] => *cache_type == self.cache,
                types => types.iter().any(|own| own.unwrap_or(self.cache) == *cache_type),
            };
            self.plans.iter().any(own)
        };
        let types: Vec<&str> =
            CacheType::ALL.into_iter().filter(is_used).map(CacheType::name).collect();
        let dense = self.cache.dtype().map_or("16 bits", |_| self.cache.name());
        Some(figure::kv_bytes(&groups, &types.join(", "), dense))
    }

    /// What plans say about themselves.
    fn facts(&self) -> Vec<(String, String)> {
        let mut facts = Vec::new();
        let Some(first) = self.plans.first() else { return facts };
        facts.push(("model".to_string(), first.plan.shape().to_string()));
        for NamedPlan { name, plan } in &self.plans {
            let from = &plan.provenance;
            let said = [&from.method, &from.space, &from.objective, &from.data];
            let mut words: Vec<String> = said.into_iter().flatten().cloned().collect();
            words.push(format!("sink {}, smallest span {}", plan.sink(), plan.min_span()));
            facts.push((name.clone(), words.join("; ")));
            if !from.measured_losses.is_empty() {
                let loss = at_lengths(&from.measured_losses);
                facts.push((format!("{name}, nats per response token"), loss));
            }
        }
        facts
    }

    fn tables(&self, summaries: &[PlanSummary]) -> Vec<Table> {
        let mut tables = Vec::new();
        let mut add = |title: &str, head: &[&str], rows: Vec<Vec<String>>| {
            let head = head.iter().map(|word| (*word).to_string()).collect();
            tables.push(Table { title: title.to_string(), head, rows });
        };
        if !summaries.is_empty() {
            let rows = self.plans.iter().zip(summaries).flat_map(|(p, summary)| {
                let row = |size: &PlanSize| [vec![p.name.clone()], size.row()].concat();
                summary.sizes().iter().map(row).collect::<Vec<_>>()
            });
            add("Sizes", &[&["plan"], &PlanSize::HEAD[..]].concat(), rows.collect());
        }
        if !self.answers.is_empty() {
            let row = |file: &Answers| {
                let right = format!("{}/{}", file.right(), file.answers.len());
                vec![file.name.clone(), right, percent(file.accuracy())]
            };
            let rows = self.answers.iter().map(row).collect();
            add("Retrieval", &["cache", "right", "accuracy"], rows);
        }
        tables
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moa_core::ModelShape;

    fn plan(name: &str, layers: usize) -> NamedPlan {
        let shape = ModelShape { layers, query_heads: 4, kv_heads: 2, head_dim: 8 };
        NamedPlan { name: name.to_string(), plan: Plan::full(shape).unwrap() }
    }

    #[test]
    fn plans_of_several_models_are_refused() {
        let plans = vec![plan("a", 2), plan("b", 3)];
        let error = Report { plans, ..Report::default() }.page().unwrap_err();
        assert!(matches!(error, Error::OtherModel { index: 1, .. }), "{error}");
        assert!(error.to_string().contains("3 layers"), "{error}");
    }

    #[test]
    fn bytes_are_told_of_the_types_that_plans_have() {
        let NamedPlan { name, plan } = plan("a", 2);
        let typed = plan.with_cache_types(vec![Some(CacheType::Int8); 4]).unwrap();
        let of = |plans| {
            let page = Report { plans, ..Report::default() }.page().unwrap();
            let figure = page.figures.into_iter().find(|figure| figure.id == "kv-bytes").unwrap();
            figure.caption
        };
        let one = NamedPlan { name, plan: typed };
        let caption = of(vec![one.clone()]);
        assert!(caption.contains("in int8, and of a dense cache in bf16;"), "{caption}");
        let two = of(vec![one, self::plan("b", 2)]);
        assert!(two.contains("in bf16, int8, and") || two.contains("in int8, bf16, and"), "{two}");
    }

    #[test]
    fn what_is_not_there_is_left_out() {
        let page = Report::default().page().unwrap();
        assert!(page.figures.is_empty() && page.tables.is_empty() && page.facts.is_empty());
        let plans = vec![plan("a", 2), plan("b", 2)];
        let page = Report { plans, lengths: vec![100, 200], ..Report::default() }.page().unwrap();
        assert_eq!(
            page.figures.iter().map(|f| &f.id[..]).collect::<Vec<_>>(),
            ["heads", "kv-bytes"]
        );
        assert_eq!(page.tables[0].rows.len(), 4);
        assert!(page.figures[0].svg().contains("b, N = 200"));
    }
}
