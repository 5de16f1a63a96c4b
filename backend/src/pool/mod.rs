//! The host memory of DMBs: how much of it there is, and extents out of it. Not which device owns what.

pub mod lines;
pub mod memfile;
pub mod ranges;

use crate::placement::pages::Policy;
use crate::settings::PoolSettings;
use dmbridge_proto::extent::{BYTES_PER_LINE, Geometry, LINE_SIZE, LINES_PER_PAGE};
use dmbridge_proto::ids::ExtentId;
use lines::{Lines, Want};
use memfile::MemFile;
use ranges::Ranges;
use std::num::NonZeroU16;
use std::sync::Arc;

/// Extents are multiples of this, so that a front-end can map them with huge pages.
pub const EXTENT_UNIT: u64 = 2 << 20;
/// Bytes of an extent for each page of control lines in it.
const BYTES_PER_LINE_PAGE: u64 = BYTES_PER_LINE * LINES_PER_PAGE as u64;

/// Counts what extents take, and makes them.
#[derive(Debug)]
pub struct Pool {
    settings: PoolSettings,
    used_bytes: u64,
    extents: u32,
    next_id: u32,
}

/// The pool is used up, or the host is.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// More than the settings allow.
    #[error("the pool's limit of {0} bytes is reached")]
    Full(u64),
    /// The host refused.
    #[error("the host has no memory for an extent: {0}")]
    Host(#[from] std::io::Error),
}

impl Pool {
    /// An empty pool.
    pub fn new(settings: PoolSettings) -> Pool {
        Pool { settings, used_bytes: 0, extents: 0, next_id: 0 }
    }

    /// The smallest extent.
    pub fn unit(&self) -> u64 {
        EXTENT_UNIT.max(self.settings.huge_pages.unwrap_or(0))
    }

    /// What may still be taken.
    pub fn free_bytes(&self) -> u64 {
        self.settings.max_bytes.saturating_sub(self.used_bytes)
    }

    /// What extents take, in bytes, and how many there are.
    pub fn used(&self) -> (u64, u32) {
        (self.used_bytes, self.extents)
    }

    /// What it was told.
    pub fn settings(&self) -> &PoolSettings {
        &self.settings
    }

    /// Takes memory for an extent, whose pages the policy places. `taken` says whether an id is in use: ids come round after 2^31 extents.
    pub fn take(
        &mut self,
        geometry: Geometry,
        policy: &Policy,
        taken: impl Fn(ExtentId) -> bool,
    ) -> Result<ExtentMemory, PoolError> {
        if geometry.size() > self.free_bytes() {
            return Err(PoolError::Full(self.settings.max_bytes));
        }
        let file = MemFile::new(geometry.size(), self.settings.huge_pages, policy)?;
        let id = loop {
            self.next_id = (self.next_id + 1) & (i32::MAX as u32);
            match ExtentId::new(self.next_id) {
                Some(id) if !taken(id) => break id,
                _ => {}
            }
        };
        self.used_bytes += geometry.size();
        self.extents += 1;
        Ok(ExtentMemory {
            id,
            geometry,
            file: Arc::new(file),
            ranges: free_ranges(geometry),
            lines: Lines::new(geometry.lines()),
            touched: 0,
            places: 0,
        })
    }

    /// The extent that another worker made: its name, its file, and the places that are taken in it. No line of it ever had
    /// a generation above `highest`. `None` if that cannot be.
    pub fn adopt(
        &mut self,
        id: ExtentId,
        geometry: Geometry,
        file: MemFile,
        highest: u16,
        places: &[Place],
    ) -> Option<ExtentMemory> {
        let mut ranges = free_ranges(geometry);
        if file.size() != geometry.size()
            || !places.iter().all(|place| ranges.take_at(place.offset, place.size))
        {
            return None;
        }
        let taken = places.iter().map(|place| (place.line, place.generation, place.private_line));
        let lines = Lines::with_taken(geometry.lines(), highest, taken)?;
        self.used_bytes += geometry.size();
        self.extents += 1;
        // Nobody knows any more what of it was never touched.
        let touched = geometry.size();
        Some(ExtentMemory {
            id,
            geometry,
            file: Arc::new(file),
            ranges,
            lines,
            touched,
            places: places.len() as u32,
        })
    }

    /// The number that was the last extent's.
    pub fn last_id(&self) -> u32 {
        self.next_id
    }

    /// The next extent's number is the one after this.
    pub fn set_last_id(&mut self, id: u32) {
        self.next_id = id & i32::MAX as u32;
    }

    /// Takes an extent's memory back.
    pub fn give(&mut self, extent: ExtentMemory) {
        self.used_bytes -= extent.geometry.size();
        self.extents -= 1;
    }
}

/// What of an extent is for DMBs.
fn free_ranges(geometry: Geometry) -> Ranges {
    Ranges::new(geometry.header_size().next_multiple_of(dmbridge_proto::GRANULE), geometry.size())
}

/// Where a DMB lies in an extent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Offset of the DMB in the extent.
    pub offset: u64,
    /// Its size, in bytes.
    pub size: u64,
    /// Number of its control line.
    pub line: u16,
    /// Generation of the line.
    pub generation: NonZeroU16,
    /// Whether the line is alone in its page.
    pub private_line: bool,
}

impl Place {
    /// Offset of the control line in the extent.
    pub fn line_offset(&self) -> u64 {
        u64::from(self.line) * LINE_SIZE
    }
}

/// An extent's memory, and what of it is in use.
#[derive(Debug)]
pub struct ExtentMemory {
    id: ExtentId,
    geometry: Geometry,
    file: Arc<MemFile>,
    ranges: Ranges,
    lines: Lines,
    /// Nothing from here on was ever part of a DMB since the memory was last given back.
    touched: u64,
    places: u32,
}

impl ExtentMemory {
    /// Its name.
    pub fn id(&self) -> ExtentId {
        self.id
    }

    /// Its size and what follows from it.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Its file.
    pub fn file(&self) -> &Arc<MemFile> {
        &self.file
    }

    /// No control line of it ever had a greater generation.
    pub fn highest_generation(&self) -> u16 {
        self.lines.highest()
    }

    /// Whether there is room for a DMB.
    pub fn fits(&self, size: u64, lines: Want) -> bool {
        self.lines.fits(lines) && self.ranges.fits(size)
    }

    /// Whether no DMB is in it.
    pub fn is_empty(&self) -> bool {
        self.places == 0
    }

    /// Takes room for a DMB; its memory is zero, and its control line says where it is.
    pub fn take(&mut self, size: u64, lines: Want) -> Option<Place> {
        if !self.fits(size, lines) {
            return None;
        }
        let offset = self.ranges.take(size)?;
        // A page of lines is what so many bytes of the extent bring: it costs such a DMB nothing.
        let lines = if size >= BYTES_PER_LINE_PAGE && self.lines.fits(Want::PrivateLine) {
            Want::PrivateLine
        } else {
            lines
        };
        let (line, generation) = self.lines.take(lines)?;
        let end = offset + size;
        if offset < self.touched {
            self.file.zero(offset, end.min(self.touched) - offset);
        }
        self.touched = self.touched.max(end);
        self.places += 1;
        let private_line = lines == Want::PrivateLine;
        let place = Place { offset, size, line, generation, private_line };
        self.file.line(place.line_offset()).publish(generation.get(), offset, size);
        Some(place)
    }

    /// A DMB ended: its line says so. Its room is still taken.
    pub fn retire(&self, place: &Place) {
        self.file.line(place.line_offset()).retire();
    }

    /// Gives the room of a DMB back. When it was the last, all of the memory goes back to the host.
    pub fn give(&mut self, place: &Place) {
        self.ranges.give(place.offset, place.size);
        self.lines.give(place.line);
        self.places -= 1;
        if self.places == 0 && self.file.release() {
            self.touched = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(max_bytes: u64) -> Pool {
        Pool::new(PoolSettings { max_bytes, ..PoolSettings::default() })
    }

    fn byte(extent: &ExtentMemory, place: &Place, at: u64) -> *mut u8 {
        extent.file.at(place.offset + at, 1)
    }

    #[test]
    fn the_pool_ends_where_the_settings_say() {
        let mut pool = pool(5 << 20);
        let two = Geometry::new(2 << 20).unwrap();
        let a = pool.take(two, &Policy::FirstTouch, |_| false).unwrap();
        let b = pool.take(two, &Policy::FirstTouch, |_| false).unwrap();
        assert_ne!(a.id(), b.id());
        assert!(matches!(pool.take(two, &Policy::FirstTouch, |_| false), Err(PoolError::Full(_))));
        pool.give(a);
        assert_eq!(pool.used(), (2 << 20, 1));
        assert!(pool.take(two, &Policy::FirstTouch, |_| false).is_ok());
    }

    #[test]
    fn reused_memory_is_zero() {
        let mut pool = pool(1 << 30);
        let mut extent = pool.take(Geometry::new(2 << 20).unwrap(), &Policy::FirstTouch, |_| false).unwrap();
        let keep = extent.take(4096, Want::AnyLine).unwrap();
        for size in [4096, 65536, 1 << 20] {
            let place = extent.take(size, Want::AnyLine).unwrap();
            for at in [0, 17, size - 1] {
                // SAFETY: inside of the extent, as `at` checks.
                unsafe {
                    assert_eq!(byte(&extent, &place, at).read_volatile(), 0);
                    byte(&extent, &place, at).write_volatile(0xff);
                }
            }
            extent.retire(&place);
            extent.give(&place);
        }
        let place = extent.take(1 << 20, Want::AnyLine).unwrap();
        for at in 0..1 << 20 {
            // SAFETY: as above.
            assert_eq!(unsafe { byte(&extent, &place, at).read_volatile() }, 0, "{at}");
        }
        extent.give(&place);
        extent.give(&keep);
        assert!(extent.is_empty());
    }

    #[test]
    fn a_line_tells_a_peer_where_the_dmb_is_until_it_ends() {
        let mut pool = pool(1 << 30);
        let mut extent = pool.take(Geometry::new(2 << 20).unwrap(), &Policy::FirstTouch, |_| false).unwrap();
        let place = extent.take(8192, Want::AnyLine).unwrap();
        let file = extent.file().clone();
        let line = file.line(place.line_offset());
        let (offset, size) = line.resolve(place.generation.get()).unwrap();
        assert!(extent.geometry().holds(offset, size));
        assert_eq!((offset, size), (place.offset, 8192));
        extent.retire(&place);
        assert_eq!(line.resolve(place.generation.get()), None);
    }

    #[test]
    fn an_extent_holds_no_more_dmbs_than_it_has_lines() {
        let mut pool = pool(1 << 30);
        let mut extent = pool.take(Geometry::new(2 << 20).unwrap(), &Policy::FirstTouch, |_| false).unwrap();
        let mut places = Vec::new();
        while let Some(place) = extent.take(4096, Want::AnyLine) {
            places.push(place);
        }
        assert_eq!(places.len() as u64, extent.geometry().lines());
        assert!(!extent.fits(4096, Want::AnyLine));
    }
}
