//! Feature bits and virtio device IDs (`docs/device.md`, 2 and 3).

bitflags::bitflags! {
    /// Feature bits of the device, and the bits of the virtio specification that it offers.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Features: u64 {
        /// `DMBRIDGE_F_MAP`: the front-end can map; pool DMBs and attach work.
        const MAP = 1 << 0;
        /// `DMBRIDGE_F_RAM_DMB`: a DMB may lie in its owner's own memory.
        const RAM_DMB = 1 << 1;
        /// `DMBRIDGE_F_FUTEX`: the driver is a process of the device's host kernel.
        const FUTEX = 1 << 2;
        /// `DMBRIDGE_F_RENDEZVOUS`: drivers meet by a key.
        const RENDEZVOUS = 1 << 3;
        /// `DMBRIDGE_F_PRIVATE_LINE`: a DMB's control line may be alone in its page.
        const PRIVATE_LINE = 1 << 4;
        /// `VIRTIO_F_INDIRECT_DESC`.
        const RING_INDIRECT_DESC = 1 << 28;
        /// `VIRTIO_F_EVENT_IDX`.
        const RING_EVENT_IDX = 1 << 29;
        /// `VIRTIO_F_VERSION_1`.
        const VERSION_1 = 1 << 32;
    }
}

/// ISM's number in the virtio specification.
pub const VIRTIO_ID_ISM: u32 = 44;
/// The number that stock QEMU's name table knows; see `docs/device.md`, 2.
pub const VIRTIO_ID_QEMU: u32 = 37;
