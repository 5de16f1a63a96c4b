//! A case as bars: the best first, each with its name and its figure, so that there is nothing to look up.

use anyhow::Result;
use plotters::style::Color;

use super::super::Measured;
use super::draw::{Anchor, FAINT, INK, Picture, colour, figure};

const WIDTH: i32 = 560;
const ROW: i32 = 27;
/// Where bars start, and how long the longest is.
const BARS: (i32, i32) = (142, 300);

/// The picture of one case.
pub fn svg(results: &[&Measured]) -> Result<String> {
    let mut sorted = results.to_vec();
    let less_is_better = sorted.first().is_some_and(|r| r.unit == "ns");
    sorted.sort_by(|a, b| {
        let order = a.value().total_cmp(&b.value());
        if less_is_better { order } else { order.reverse() }
    });
    let longest = sorted.iter().map(|r| r.max()).fold(f64::MIN_POSITIVE, f64::max);
    let x = |value: f64| BARS.0 + (f64::from(BARS.1) * value / longest).round() as i32;

    Picture::draw(WIDTH, ROW * sorted.len() as i32 + 6, |picture| {
        for (row, result) in sorted.iter().enumerate() {
            let y = ROW * row as i32 + ROW / 2 + 3;
            let (transport, value) = (result.transport, result.value());
            let (ours, limit) = (transport.is_ours(), transport.is_limit());
            let ink = if ours { colour(transport) } else { INK };
            picture.text(&transport.name(), (BARS.0 - 10, y), Anchor::Right, 13, ink, ours)?;

            let (from, to) = ((BARS.0, y - 8), (x(value).max(BARS.0 + 1), y + 8));
            if limit {
                picture.rectangle(from, to, colour(transport).mix(0.22).filled())?;
                picture.rectangle(from, to, colour(transport).stroke_width(1))?;
            } else {
                picture.rectangle(from, to, colour(transport).filled())?;
            }
            // From the worst to the best round.
            let (low, high) = (x(result.min()), x(result.max()));
            if high - low > 3 {
                picture.path(vec![(low, y), (high, y)], INK, 1)?;
                for end in [low, high] {
                    picture.path(vec![(end, y - 3), (end, y + 3)], INK, 1)?;
                }
            }
            let text = figure(value, result.unit);
            let right = to.0.max(high) + 8;
            picture.text(&text, (right, y), Anchor::Left, 13, ink, ours)?;
            if limit {
                let after = right + 8 * text.chars().count() as i32 + 4;
                picture.text("limit", (after, y), Anchor::Left, 12, FAINT, false)?;
            }
        }
        Ok(())
    })
}
