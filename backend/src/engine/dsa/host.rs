//! The host's work queues: found in sysfs, opened as character devices, fed by `MOVDIR64B` (a dedicated queue), `ENQCMD` (a
//! shared one), or `write()`, where the kernel does not let a process map a queue's portal.

use super::descriptor::{Descriptor, OPCODE_BATCH};
use super::queue::{Limits, NotTaken, WorkQueue};
use crate::topology::NodeId;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock};

/// Where Linux tells of queues.
const SYSFS: &str = "/sys/bus/dsa/devices";
/// Where they are opened.
const DEV: &str = "/dev/dsa";
/// Queues of this name (`accel-config config-wq --name`) are meant for this daemon.
pub const NAME: &str = "dmbridge";
/// A queue whose descriptors move fewer bytes than this is of no use.
const LEAST: u64 = 4096;
const PORTAL: usize = 4096;

/// A queue that can be used, as sysfs describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// `wq0.0`.
    pub queue: String,
    /// What the administrator called it.
    pub name: String,
    /// Its device's node.
    pub node: Option<NodeId>,
    /// Whether one process has it alone.
    pub dedicated: bool,
    /// How many descriptors it holds.
    pub size: usize,
    /// What it takes.
    pub limits: Limits,
}

/// The queues that user space may have, and that are enabled.
pub fn find() -> Vec<Found> {
    find_in(Path::new(SYSFS))
}

fn find_in(sysfs: &Path) -> Vec<Found> {
    let entries = fs::read_dir(sysfs).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut found: Vec<Found> =
        names.filter(|name| name.starts_with("wq")).filter_map(|name| look(sysfs, name)).collect();
    found.sort_by(|a, b| a.queue.cmp(&b.queue));
    found
}

fn look(sysfs: &Path, queue: String) -> Option<Found> {
    let read = |path: PathBuf| fs::read_to_string(path).ok().map(|text| text.trim().to_string());
    let of = |attribute: &str| read(sysfs.join(&queue).join(attribute));
    if of("state")? != "enabled" || of("type")? != "user" {
        return None;
    }
    // Other devices of the driver, which compress, have queues of the same names, and other numbers.
    let device = sysfs.join(format!("dsa{}", queue.strip_prefix("wq")?.split_once('.')?.0));
    if !device.is_dir() {
        return None;
    }
    let node = read(device.join("numa_node"));
    Some(Found {
        name: of("name").unwrap_or_default(),
        node: node.and_then(|node| node.parse().ok()).and_then(NodeId::new),
        dedicated: of("mode")? == "dedicated",
        size: of("size")?.parse().ok().filter(|size| *size != 0)?,
        limits: Limits {
            // More than a descriptor can say is as good as its most.
            max_transfer: of("max_transfer_size")?
                .parse::<u64>()
                .ok()
                .filter(|size| *size >= LEAST)?
                .min(1 << 31) as u32,
            max_batch: of("max_batch_size").and_then(|size| size.parse().ok()).unwrap_or(1),
        },
        queue,
    })
}

/// How descriptors get into a queue.
#[derive(Debug)]
enum Way {
    /// Stored to the portal of a dedicated queue, which never says that it is full: no more than its size at a time.
    Dedicated(Portal),
    /// Stored to the portal of a shared queue, which says so.
    Shared(Portal),
    /// Written to the file.
    Write,
}

/// An open queue.
#[derive(Debug)]
pub struct HostQueue {
    limits: Limits,
    /// None once it is given up. The kernel ends what is under way when the file is closed.
    open: RwLock<Option<(Way, File)>>,
    /// Descriptors that a dedicated queue has room for.
    room: AtomicUsize,
}

impl HostQueue {
    /// Opens a queue.
    ///
    /// # Errors
    ///
    /// As the kernel says; `EBUSY` if somebody else has a dedicated one.
    pub fn open(found: &Found) -> io::Result<HostQueue> {
        let file = File::options().read(true).write(true).open(Path::new(DEV).join(&found.queue))?;
        let instruction = if found.dedicated { has_movdir64b() } else { has_enqcmd() };
        let portal = if instruction { Portal::map(&file) } else { Err(io::ErrorKind::Unsupported.into()) };
        let mut limits = found.limits;
        let way = match portal {
            Ok(portal) if found.dedicated => Way::Dedicated(portal),
            Ok(portal) => Way::Shared(portal),
            Err(error) => {
                tracing::debug!("{}: its portal cannot be used ({error}), so it is written to", found.queue);
                // The kernel looks at each descriptor, but not at lists of them.
                limits.max_batch = 1;
                Way::Write
            }
        };
        Ok(HostQueue { limits, open: RwLock::new(Some((way, file))), room: AtomicUsize::new(found.size) })
    }
}

impl WorkQueue for HostQueue {
    fn limits(&self) -> Limits {
        self.limits
    }

    unsafe fn submit(&self, descriptor: &Descriptor) -> Result<(), NotTaken> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let Some((way, file)) = &*open else { return Err(NotTaken::Lost) };
        // A shared queue has room for others, too; more than its size from here is too much in any case.
        let take = |room: usize| room.checked_sub(1);
        if self.room.fetch_update(Ordering::AcqRel, Ordering::Relaxed, take).is_err() {
            return Err(NotTaken::Busy);
        }
        let taken = match way {
            Way::Dedicated(portal) => {
                portal.movdir64b(descriptor);
                Ok(())
            }
            Way::Shared(portal) => portal.enqcmd(descriptor).then_some(()).ok_or(NotTaken::Busy),
            Way::Write => {
                debug_assert_ne!(descriptor.opcode(), OPCODE_BATCH);
                write(file, descriptor)
            }
        };
        if taken.is_err() {
            self.completed();
        }
        taken
    }

    fn completed(&self) {
        self.room.fetch_add(1, Ordering::AcqRel);
    }

    fn abandon(&self) {
        // Closing the file waits until the device has drained what this process gave it.
        drop(self.open.write().unwrap_or_else(PoisonError::into_inner).take());
    }
}

fn write(mut file: &File, descriptor: &Descriptor) -> Result<(), NotTaken> {
    // SAFETY: a descriptor is 64 bytes of integers without padding.
    let bytes = unsafe { std::slice::from_raw_parts(std::ptr::from_ref(descriptor).cast::<u8>(), 64) };
    match file.write(bytes) {
        Ok(64) => Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY | libc::EINTR)) => {
            Err(NotTaken::Busy)
        }
        result => {
            tracing::debug!("an accelerator's queue did not take a descriptor: {result:?}");
            Err(NotTaken::Lost)
        }
    }
}

/// The page of a queue to which descriptors are stored.
#[derive(Debug)]
struct Portal(*mut u8);

// SAFETY: the page belongs to no thread; a store of 64 bytes to it is one access.
unsafe impl Send for Portal {}
// SAFETY: as above.
unsafe impl Sync for Portal {}

impl Portal {
    fn map(file: &File) -> io::Result<Portal> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let page = unsafe {
            libc::mmap(std::ptr::null_mut(), PORTAL, libc::PROT_WRITE, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if page == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Portal(page.cast())) }
    }

    /// Stores a descriptor.
    #[cfg(target_arch = "x86_64")]
    fn movdir64b(&self, descriptor: &Descriptor) {
        // SAFETY: the processor has the instruction, the page is mapped for stores as long as `self`, and the descriptor is
        // readable. The fence comes first because the store is ordered by nothing: the device must see records and lists.
        unsafe {
            std::arch::asm!(
                "sfence",
                "movdir64b {portal}, [{descriptor}]",
                portal = in(reg) self.0,
                descriptor = in(reg) descriptor,
                options(nostack, preserves_flags)
            );
        }
    }

    /// Stores a descriptor, unless the queue says that it is full.
    #[cfg(target_arch = "x86_64")]
    fn enqcmd(&self, descriptor: &Descriptor) -> bool {
        let full: u8;
        // SAFETY: as above; the zero flag says whether the queue asks to be tried again.
        unsafe {
            std::arch::asm!(
                "sfence",
                "enqcmd {portal}, [{descriptor}]",
                "setz {full}",
                portal = in(reg) self.0,
                descriptor = in(reg) descriptor,
                full = out(reg_byte) full,
                options(nostack)
            );
        }
        full == 0
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn movdir64b(&self, _: &Descriptor) {
        unreachable!("only x86-64 has such queues")
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn enqcmd(&self, _: &Descriptor) -> bool {
        unreachable!("only x86-64 has such queues")
    }
}

impl Drop for Portal {
    fn drop(&mut self) {
        // SAFETY: mapped in `map`, and used through `self` only.
        unsafe { libc::munmap(self.0.cast(), PORTAL) };
    }
}

/// Bits of CPUID leaf 7, register ECX.
#[cfg(target_arch = "x86_64")]
fn has(bit: u32) -> bool {
    use std::arch::x86_64::{__cpuid_count, __get_cpuid_max};
    __get_cpuid_max(0).0 >= 7 && __cpuid_count(7, 0).ecx & 1 << bit != 0
}

#[cfg(not(target_arch = "x86_64"))]
fn has(_: u32) -> bool {
    false
}

fn has_movdir64b() -> bool {
    has(28)
}

fn has_enqcmd() -> bool {
    has(29)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::dsa::descriptor::Record;

    #[test]
    fn queues_are_found_that_user_space_may_have() {
        let sysfs = tempfile::tempdir().unwrap();
        let queue = |name: &str, attributes: &[(&str, &str)]| {
            let folder = sysfs.path().join(name);
            fs::create_dir(&folder).unwrap();
            for (attribute, value) in attributes {
                fs::write(folder.join(attribute), format!("{value}\n")).unwrap();
            }
        };
        let usual = [
            ("state", "enabled"),
            ("type", "user"),
            ("name", "dmbridge"),
            ("mode", "shared"),
            ("size", "16"),
            ("max_transfer_size", "2147483648"),
            ("max_batch_size", "32"),
        ];
        let but = |attribute, value| {
            let mut all = usual.to_vec();
            all.retain(|(name, _)| *name != attribute);
            all.push((attribute, value));
            all
        };
        queue("dsa0", &[("numa_node", "1")]);
        queue("dsa2", &[("numa_node", "-1")]);
        queue("iax1", &[("numa_node", "0")]);
        queue("wq1.0", &usual);
        queue("wq0.0", &usual);
        queue("wq0.1", &but("state", "disabled"));
        queue("wq0.2", &but("type", "kernel"));
        queue("wq0.3", &but("size", "0"));
        queue("wq0.4", &but("max_transfer_size", "2048"));
        queue("wq2.0", &but("mode", "dedicated"));
        queue("wq9", &usual);
        let found = find_in(sysfs.path());
        assert_eq!(found.iter().map(|wq| wq.queue.as_str()).collect::<Vec<_>>(), ["wq0.0", "wq2.0"]);
        let limits = Limits { max_transfer: 1 << 31, max_batch: 32 };
        assert_eq!((found[0].node, found[0].dedicated, found[0].size), (NodeId::new(1), false, 16));
        assert_eq!((found[0].limits, found[0].name.as_str()), (limits, NAME));
        assert_eq!((found[1].node, found[1].dedicated), (None, true));
        assert_eq!(find_in(Path::new("/nowhere")), []);
    }

    #[test]
    fn a_queue_that_is_not_there_is_an_error() {
        let limits = Limits { max_transfer: 4096, max_batch: 1 };
        let found = Found {
            queue: "wq999.9".into(),
            name: String::new(),
            node: None,
            dedicated: true,
            size: 1,
            limits,
        };
        assert!(HostQueue::open(&found).is_err());
    }

    /// The instruction that feeds a dedicated queue stores to any memory, so it can be seen to store what it should.
    #[test]
    fn a_descriptor_is_stored_as_it_is() {
        if !has_movdir64b() {
            return;
        }
        let file = File::from(
            nix::sys::memfd::memfd_create(c"portal", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap(),
        );
        file.set_len(PORTAL as u64).unwrap();
        let file = File::options().read(true).write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let file = file.unwrap();
        let record = Record::default();
        let descriptor = Descriptor::memmove(1, 2, 3, &record);
        let limits = Limits { max_transfer: 4096, max_batch: 1 };
        let way = Way::Dedicated(Portal::map(&file).unwrap());
        let queue = HostQueue {
            limits,
            open: RwLock::new(Some((way, file.try_clone().unwrap()))),
            room: AtomicUsize::new(1),
        };
        // SAFETY: nobody works on it.
        unsafe {
            assert_eq!(queue.submit(&descriptor), Ok(()));
            assert_eq!(queue.submit(&descriptor), Err(NotTaken::Busy), "no more than the queue holds");
            queue.completed();
            assert_eq!(queue.submit(&descriptor), Ok(()));
        }
        let mut bytes = [0; 64];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
        // SAFETY: a descriptor is 64 bytes of integers.
        assert_eq!(unsafe { std::mem::transmute::<[u8; 64], Descriptor>(bytes) }, descriptor);
        queue.abandon();
        // SAFETY: as above.
        assert_eq!(unsafe { queue.submit(&descriptor) }, Err(NotTaken::Lost));
    }

    /// A queue that is written to, over one end of a pair of sockets, which say as the kernel's driver does that they are full.
    #[test]
    fn where_the_portal_cannot_be_mapped_descriptors_are_written_one_by_one() {
        use std::os::unix::net::UnixDatagram;
        let (device, end) = UnixDatagram::pair().unwrap();
        end.set_nonblocking(true).unwrap();
        let file = File::from(std::os::fd::OwnedFd::from(end));
        let limits = Limits { max_transfer: 4096, max_batch: 1 };
        let size = 1 << 20;
        let open = RwLock::new(Some((Way::Write, file)));
        let queue = HostQueue { limits, open, room: AtomicUsize::new(size) };
        let record = Record::default();
        let descriptor = |number: u32| Descriptor::memmove(1, 2, number, &record);
        // SAFETY: nobody works on them.
        let submit = |number| unsafe { queue.submit(&descriptor(number)) };
        let mut taken = 0;
        while submit(taken + 1) == Ok(()) {
            taken += 1;
        }
        assert_eq!((submit(taken + 1), taken > 0), (Err(NotTaken::Busy), true));
        assert_eq!(
            queue.room.load(Ordering::Relaxed),
            size - taken as usize,
            "what is not taken needs no room"
        );
        let mut bytes = [0; 65];
        for number in 1..=taken {
            assert_eq!(device.recv(&mut bytes).unwrap(), 64);
            // SAFETY: a descriptor is 64 bytes of integers.
            let got: Descriptor = unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) };
            assert_eq!(got, descriptor(number));
        }
        assert_eq!(submit(taken + 1), Ok(()));
        drop(device);
        assert_eq!(submit(taken + 2), Err(NotTaken::Lost));
    }
}
