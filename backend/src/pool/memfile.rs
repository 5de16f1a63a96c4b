//! The memory of one extent: a sealed memfd, and our mapping of it. Not who may use which part of it, nor on which NUMA
//! node its pages are to lie.
//!
//! Each extent has a file of its own, so that the descriptor that a front-end gets with `SHMEM_MAP` reveals one pair's
//! memory and no more. The seals make the file's size final: nobody can take memory away under anybody else.

use crate::keep;
use crate::placement::pages::{self, Policy, Range};
use crate::topology::NodeId;
use dmbridge_proto::line::ControlLine;
use nix::fcntl::{FallocateFlags, FcntlArg, SealFlag, fallocate, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// What the files are called, for people who look into `/proc`.
pub const NAME: &str = "dmbridge-extent";

/// Ranges from this size on are zeroed by giving their memory back.
const PUNCH_FROM: u64 = 256 << 10;

/// To which of the two front-ends of its pair a file is lent. A lock belongs to a description of a file and ends with it, so
/// a lock of a byte each tells which of them is still there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Borrower {
    /// The one of the DMBs' owner.
    Owner,
    /// The other one.
    Peer,
}

impl Borrower {
    fn lock(self, kind: libc::c_int) -> libc::flock {
        libc::flock {
            l_type: kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: self as libc::off_t,
            l_len: 1,
            l_pid: 0,
        }
    }
}

/// A sealed file in memory, mapped.
#[derive(Debug)]
pub struct MemFile {
    file: File,
    start: *mut u8,
    size: u64,
    huge: bool,
    policy: Policy,
    number: u64,
}

// SAFETY: `start` is the address of a mapping that lives as long as the value; every access goes through raw pointers
// and atomics, because guests access the memory at the same time.
unsafe impl Send for MemFile {}
// SAFETY: as above.
unsafe impl Sync for MemFile {}

impl MemFile {
    /// `size` bytes of zeroes, in pages of `huge_pages` bytes if given, which are then taken at once. Whoever touches a
    /// page first, the policy says where it comes from.
    pub fn new(size: u64, huge_pages: Option<u64>, policy: &Policy) -> io::Result<MemFile> {
        let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        if let Some(page) = huge_pages {
            // The size is told as its logarithm, as for mmap.
            flags |= MFdFlags::MFD_HUGETLB
                | MFdFlags::from_bits_retain(page.trailing_zeros() << libc::MFD_HUGE_SHIFT);
        }
        let fd = memfd_create(NAME, flags)?;
        let file = File::from(fd);
        file.set_len(size)?;
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
        let mut file = MemFile::map(file, size, huge_pages.is_some(), keep::number())?;
        match pages::set_policy(file.range(), policy) {
            Ok(()) => file.policy = policy.clone(),
            Err(error) => tracing::warn!(
                "an extent cannot be placed ({policy:?}), and lies where it is touched: {error}"
            ),
        }
        if file.huge {
            // A huge page that is missing later would be a SIGBUS; here it is an error.
            fallocate(&file.file, FallocateFlags::empty(), 0, size as i64)?;
        }
        Ok(file)
    }

    /// The one that another worker made with this size, and that a keeper has under this number. Where its pages are taken from,
    /// the kernel remembers.
    pub fn adopt(file: File, size: u64, huge: bool, policy: Policy, number: u64) -> io::Result<MemFile> {
        let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW;
        let is_sealed = SealFlag::from_bits_truncate(fcntl(&file, FcntlArg::F_GET_SEALS)?).contains(seals);
        if !is_sealed || file.metadata()?.len() != size {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the file is no extent of this size"));
        }
        let mut file = MemFile::map(file, size, huge, number)?;
        file.policy = policy;
        Ok(file)
    }

    fn map(file: File, size: u64, huge: bool, number: u64) -> io::Result<MemFile> {
        // SAFETY: a new mapping of a file that is `size` bytes long and cannot shrink.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the range is the mapping that was just made; the advice changes no content.
        unsafe { libc::madvise(start, size as usize, libc::MADV_DONTDUMP) };
        Ok(MemFile { file, start: start.cast(), size, huge, policy: Policy::FirstTouch, number })
    }

    /// The number under which a keeper has it.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Whether it is made of huge pages.
    pub fn is_huge(&self) -> bool {
        self.huge
    }

    /// The file, for front-ends to map.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// A description of the file for one front-end, marked for it: as long as the front-end has it open or mapped,
    /// [`is_lent`](Self::is_lent) says so.
    pub fn lend(&self, borrower: Borrower) -> io::Result<File> {
        let name = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let file = File::options().read(true).write(true).open(name)?;
        fcntl(&file, FcntlArg::F_OFD_SETLK(&borrower.lock(libc::F_RDLCK)))?;
        Ok(file)
    }

    /// Whether the front-end to which it was lent still has it.
    pub fn is_lent(&self, borrower: Borrower) -> bool {
        let mut lock = borrower.lock(libc::F_WRLCK);
        // SAFETY: the request reads and writes one `flock`.
        let result = unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) };
        result == 0 && libc::c_int::from(lock.l_type) != libc::F_UNLCK
    }

    /// Whether another description is of this file.
    pub fn is(&self, other: &File) -> bool {
        use std::os::unix::fs::MetadataExt;
        let identity = |file: &File| file.metadata().map(|data| (data.dev(), data.ino())).ok();
        identity(other).is_some_and(|other| identity(&self.file) == Some(other))
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// All of our mapping.
    pub fn range(&self) -> Range {
        Range { start: self.start, len: self.size }
    }

    /// Where its pages are taken from, as far as the kernel agreed.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// The node that its pages are taken from, if it is one.
    pub fn node(&self) -> Option<NodeId> {
        match self.policy {
            Policy::Prefer(node) => Some(node),
            Policy::FirstTouch | Policy::Interleave(_) => None,
        }
    }

    /// Our address of `len` bytes at `offset`; they stay mapped as long as the file is borrowed.
    ///
    /// # Panics
    ///
    /// If they are not inside.
    pub fn at(&self, offset: u64, len: u64) -> *mut u8 {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.size), "outside of the extent");
        self.start.wrapping_add(offset as usize)
    }

    /// The control line at `offset`.
    pub fn line(&self, offset: u64) -> &ControlLine {
        let ptr = self.at(offset, dmbridge_proto::extent::LINE_SIZE);
        assert!(ptr.addr().is_multiple_of(64), "a control line is aligned to 64 bytes");
        // SAFETY: aligned and mapped, as checked, for as long as `self` is borrowed; others are guests.
        unsafe { ControlLine::from_ptr(ptr) }
    }

    /// Makes `len` bytes at `offset`, both multiples of the page size, zero.
    pub fn zero(&self, offset: u64, len: u64) {
        if len >= PUNCH_FROM && !self.huge && self.punch(offset, len) {
            return;
        }
        let ptr = self.at(offset, len);
        // SAFETY: mapped for `len` bytes, as checked; nobody of this process accesses memory that no DMB uses.
        unsafe { std::ptr::write_bytes(ptr, 0, len as usize) };
    }

    /// Gives all of the memory back to the host, so that it reads as zeroes. False if it could not be: huge pages stay,
    /// because nobody knows whether the host would have them again.
    pub fn release(&self) -> bool {
        !self.huge && self.punch(0, self.size)
    }

    fn punch(&self, offset: u64, len: u64) -> bool {
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.file, flags, offset as i64, len as i64).is_ok()
    }
}

impl Drop for MemFile {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; nobody holds an address beyond the life of the value.
        unsafe { libc::munmap(self.start.cast(), self.size as usize) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn nobody_can_change_the_size_of_the_file() {
        let file = MemFile::new(1 << 20, None, &Policy::FirstTouch).unwrap();
        let theirs = File::from(file.fd().try_clone_to_owned().unwrap());
        assert!(theirs.set_len(0).is_err());
        assert!(theirs.set_len(2 << 20).is_err());
    }

    #[test]
    fn who_has_the_file_is_known_until_it_is_neither_open_nor_mapped() {
        let file = MemFile::new(1 << 20, None, &Policy::FirstTouch).unwrap();
        let (owners, peers) = (file.lend(Borrower::Owner).unwrap(), file.lend(Borrower::Peer).unwrap());
        // One that was lent before may not be back yet.
        let again = file.lend(Borrower::Owner).unwrap();
        drop(peers);
        assert!(file.is_lent(Borrower::Owner) && !file.is_lent(Borrower::Peer));
        drop(again);
        // SAFETY: a new mapping, which nobody touches.
        let mapped = unsafe {
            let fd = owners.as_raw_fd();
            libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, fd, 0)
        };
        drop(owners);
        assert!(file.is_lent(Borrower::Owner));
        // SAFETY: the mapping of above.
        unsafe { libc::munmap(mapped, 4096) };
        assert!(!file.is_lent(Borrower::Owner));
    }

    #[test]
    fn zeroing_reaches_every_byte_of_its_range_and_no_other() {
        let file = MemFile::new(1 << 20, None, &Policy::FirstTouch).unwrap();
        for (offset, len) in [(4096, 8192), (4096, PUNCH_FROM)] {
            // SAFETY: inside of the mapping, as `at` checks.
            unsafe { std::ptr::write_bytes(file.at(0, 1 << 20), 0xa5, 1 << 20) };
            file.zero(offset, len);
            for at in 0..1 << 20 {
                // SAFETY: as above.
                let byte = unsafe { file.at(at, 1).read_volatile() };
                assert_eq!(byte == 0, (offset..offset + len).contains(&at), "{at}");
            }
        }
    }

    #[test]
    fn released_memory_goes_back_to_the_host() {
        let file = MemFile::new(1 << 20, None, &Policy::FirstTouch).unwrap();
        // SAFETY: inside of the mapping, as `at` checks.
        unsafe { std::ptr::write_bytes(file.at(0, 1 << 20), 0xa5, 1 << 20) };
        assert!(file.file.metadata().unwrap().blocks() > 0);
        assert!(file.release());
        assert_eq!(file.file.metadata().unwrap().blocks(), 0);
    }
}
